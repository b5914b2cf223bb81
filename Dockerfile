# One image for every process of ours; docker-compose.yml says which command each runs. Nothing but Python's image and PyPI is needed.

FROM python:3.13-slim AS build
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 PIP_ROOT_USER_ACTION=ignore PIP_ONLY_BINARY=:all:

# This pip, whatever the base image has: it takes versions and hashes from a constraints file (26.0 does not). So the one file that pins
# everything also serves an image without the extras `local` and `dev`; a package that it does not name, or another hash, ends the build.
RUN python -m venv /pip \
    && echo 'pip==26.3 --hash=sha256:f3b60b20ffaadd4415ed7957212a38ac63fa4c5fa375bd0f4a797777940fad13' > /pip/requirements.txt \
    && /pip/bin/python -m pip install --quiet --require-hashes -r /pip/requirements.txt

WORKDIR /build
COPY pyproject.toml requirements.txt ./
RUN python -c 'import tomllib; p = tomllib.load(open("pyproject.toml", "rb"))["project"]; \
print(*p["dependencies"], *p["optional-dependencies"]["llm"], sep="\n")' > wanted.txt \
    && python -m venv --without-pip /venv \
    && /pip/bin/python -m pip --python /venv/bin/python install --quiet --require-hashes -r wanted.txt -c requirements.txt \
    && /pip/bin/python -m pip --python /venv/bin/python check

WORKDIR /app
COPY alembic.ini ./
COPY migrations migrations
COPY worker worker
COPY api api
# Whatever the umask of the checkout: everybody may read, nobody but root may write. Compiled here, because nothing can be written later.
RUN chmod -R u=rwX,go=rX . && /venv/bin/python -m compileall -q .


FROM python:3.13-slim
ENV PATH=/venv/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1

# The uid is part of the interface: the volumes with the secrets belong to it. `.env` leads to generated settings, if there are any
# (docker-compose.yml has them made); the environment overrides them.
RUN groupadd --gid 10001 chatkeep \
    && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /nonexistent --shell /usr/sbin/nologin chatkeep \
    && install -d -o chatkeep -g chatkeep /secrets /secrets/app /secrets/postgres /secrets/redis /secrets/broker
COPY --from=build /venv /venv
COPY --from=build /app /app
RUN ln -s /secrets/app/env /app/.env

WORKDIR /app
USER 10001:10001
CMD ["uvicorn", "api.app:app", "--host=0.0.0.0", "--port=8000", "--timeout-graceful-shutdown=10", "--no-access-log"]
