#!/bin/sh
# Say what a launch will do, then serve: examples/serve_vllm.sh MODEL [vLLM's own flags]
set -eu
fse-patch plan "$1" -- vllm serve "$@" || echo "vLLM will serve this model as it always does." >&2
FSE_PATCH=1 exec vllm serve "$@"
