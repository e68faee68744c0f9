# fse_patch on top of vLLM's public image. Build it from the clone:
#   make wheel && docker build -f docker/vllm.Dockerfile -t vllm-fse .
# The release is one that docs/versions.md lists; the image's own entry point stays: docker run ... vllm-fse MODEL
ARG VLLM_VERSION=0.26.0
FROM vllm/vllm-openai:v${VLLM_VERSION}

COPY dist/*.whl /tmp/fse_patch/
# --no-deps would leave out wrapt; what the image has already is not replaced.
RUN python3 -m pip install --no-cache-dir /tmp/fse_patch/*.whl && rm -r /tmp/fse_patch

ENV FSE_PATCH=vllm
