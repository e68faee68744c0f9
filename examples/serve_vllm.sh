#!/bin/sh
# Say what a launch will do, then serve: examples/serve_vllm.sh MODEL [vLLM's own flags]
set -eu
fse-patch plan "$1" -- vllm serve "$@" || echo "vLLM will serve this model as it always does." >&2
# The name in VLLM_PLUGINS lets `fse-patch status` ask; yours must be named beside it.
FSE_PATCH=1 VLLM_PLUGINS="${VLLM_PLUGINS:-fse_patch}" exec vllm serve "$@"
