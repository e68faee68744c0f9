#!/bin/sh
# Say what a launch will do, then serve: examples/serve_sglang.sh MODEL [SGLang's own flags]
set -eu
model=$1
shift
fse-patch plan "$model" -- python -m fse_patch.launch_sglang --model-path "$model" "$@" ||
    echo "SGLang will serve this model as it always does." >&2
exec python -m fse_patch.launch_sglang --model-path "$model" "$@"
