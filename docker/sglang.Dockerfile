# fse_patch on top of SGLang's public image. Build it from the clone:
#   make wheel && docker build -f docker/sglang.Dockerfile -t sglang-fse .
# Then: docker run --gpus all sglang-fse python3 -m fse_patch.launch_sglang --model-path MODEL
ARG SGLANG_VERSION=0.5.17
FROM lmsysorg/sglang:v${SGLANG_VERSION}

COPY dist/*.whl /tmp/fse_patch/
# --no-deps would leave out wrapt; what the image has already is not replaced.
RUN python3 -m pip install --no-cache-dir /tmp/fse_patch/*.whl && rm -r /tmp/fse_patch

ENV FSE_PATCH=sglang
