#!/bin/sh
# Makes the secrets of docker/compose.yaml in docker/secrets, once: existing ones stay. Remove a file to replace it.
#
# The folder keeps other users out (mode 0700). The files are readable within it, because a container's user is not the
# user who made them, and compose mounts each file into the services that name it and nowhere else.
set -eu
umask 077
cd "$(dirname "$0")"
mkdir -p secrets
chmod 700 secrets

random() {
    head -c 32 /dev/urandom | od -An -v -tx1 | tr -d ' \n'
}

keep() { # keep NAME: writes standard input to secrets/NAME unless that exists
    if [ -e "secrets/$1" ]; then
        cat >/dev/null
    else
        cat >"secrets/$1"
    fi
    chmod 444 "secrets/$1"
}

for name in ray_token postgres_password mlflow_password mlflow_session_key; do
    random | keep "$name"
done

# One user of the object store each: who makes buckets, who keeps artifacts, who keeps runs.
for user in admin mlflow jobs; do
    printf '[default]\naws_access_key_id = %s\naws_secret_access_key = %s\n' "$user" "$(random)" | keep "s3_$user"
done
secret_of() {
    sed -n 's/^aws_secret_access_key = //p' "secrets/s3_$1"
}
rm -f secrets/s3_identities
keep s3_identities <<IDENTITIES
{"identities": [
  {"name": "admin", "credentials": [{"accessKey": "admin", "secretKey": "$(secret_of admin)"}], "actions": ["Admin"]},
  {"name": "mlflow", "credentials": [{"accessKey": "mlflow", "secretKey": "$(secret_of mlflow)"}],
   "actions": ["Read:artifacts", "Write:artifacts", "List:artifacts", "Tagging:artifacts"]},
  {"name": "jobs", "credentials": [{"accessKey": "jobs", "secretKey": "$(secret_of jobs)"}],
   "actions": ["Read:runs", "Write:runs", "List:runs", "Tagging:runs"]}
]}
IDENTITIES
echo "docker/secrets: there"
