#!/bin/sh
# Starts a program with its secrets, each read from the file that NAME_FILE names: so neither the image, nor the compose
# file, nor `docker inspect`, nor a command line holds one.
set -eu

for name in PGPASSWORD MLFLOW_AUTH_ADMIN_PASSWORD MLFLOW_FLASK_SERVER_SECRET_KEY MLFLOW_TRACKING_PASSWORD; do
    eval "file=\${${name}_FILE:-}"
    if [ -n "$file" ]; then
        [ -r "$file" ] || { echo "${name}_FILE: $file cannot be read; docker/secrets.sh makes the secrets." >&2; exit 2; }
        export "$name=$(cat "$file")"
        unset "${name}_FILE"
    fi
done

exec "$@"
