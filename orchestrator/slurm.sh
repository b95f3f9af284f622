set -euo pipefail
umask 077
export PATH="$program:$PATH"

# DAB_SLURM_JOB is the number of an earlier job: its run goes on.
folder=$home/slurm/${DAB_SLURM_JOB:-$SLURM_JOB_ID}
export DAB_HOME=$folder
mkdir -p -- "$DAB_HOME"
printf '%s' "$config" >"$folder/config.yaml"
rm -f -- "$folder/ended"

# Whoever holds the token may run programs as you. It lives as long as this job.
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH="$folder/token"
head -c 32 /dev/urandom | od -An -v -tx1 | tr -d ' \n' >"$RAY_AUTH_TOKEN_PATH"
trap 'rm -f -- "$RAY_AUTH_TOKEN_PATH"' EXIT

# This script runs on the first node, which so becomes the head. Its address is one of its own, not what its name means
# elsewhere: Debian maps a machine's name to 127.0.1.1. Ports below Ray's workers' and the kernel's own.
export port=$((20000 + SLURM_JOB_ID % 1000 * 10)) folder tracking
if [[ -n $interface ]]; then
    head=$(ip -4 -oneline address show dev "$interface" | awk '{sub("/.*", "", $4); print $4; exit}')
else
    head=$(hostname -I | cut -d' ' -f1)
fi
export RAY_SYMMETRIC_RUN_CLUSTER_WAIT_TIMEOUT=300 RAY_USAGE_STATS_ENABLED=0 RAY_DEDUP_LOGS=0
unset RAY_ADDRESS RAY_API_SERVER_ADDRESS RAY_AUTH_TOKEN

# On each node: Ray in a folder of its own, since another user's /tmp/ray may be in the way. Ray gives up where a head
# needs more than 40 s, as from a cold network file system, and where it was killed: then the node comes back.
node() {
    export RAY_TMPDIR=/tmp/dab-$SLURM_JOB_ID
    mkdir -p -- "$RAY_TMPDIR"
    for _ in 1 2 3 4 5; do
        ray symmetric-run --address "$1:$port" --min-nodes "$SLURM_JOB_NUM_NODES" --num-gpus="$2" \
            --object-store-memory=200000000 --dashboard-host=127.0.0.1 --dashboard-port=$((port + 1)) \
            -- bash -c train 2>&1 | grep --line-buffered -v 'VINFO scripts.py' # command lines of 5,000 characters
        [[ ! -e $folder/ended ]] || break
        sleep 5
    done
}

# On the head, when all nodes are there: submit the run, or go on with it, and follow it to its end.
train() {
    set -euo pipefail
    export PYTHONUNBUFFERED=1
    trap '[[ -e $folder/ended ]] || echo failed >"$folder/ended"' EXIT
    dab cluster add slurm --address "http://127.0.0.1:$((port + 1))" --token-file "$RAY_AUTH_TOKEN_PATH" \
        --tracking "$tracking" --storage "$folder/storage" --replace >/dev/null
    if [[ -s $folder/run ]]; then
        dab resume "$(<"$folder/run")" --tracking-uri "$tracking" --address slurm --detach
    else
        dab submit "$folder/config.yaml" --address slurm --detach --json | field run_id >"$folder/run.new"
        mv -- "$folder/run.new" "$folder/run"
    fi
    run=$(<"$folder/run")
    dab logs "$run" --follow --tracking-uri "$tracking" || true
    dab status "$run" --tracking-uri "$tracking" --json | field status >"$folder/ended.new"
    mv -- "$folder/ended.new" "$folder/ended"
}

# field NAME: that of the JSON document on standard input
field() {
    python -c 'import json, sys; print(json.load(sys.stdin)[sys.argv[1]])' "$1"
}
export -f node train field

# A tracking server on the head, with a password that every node has, for as long as the job.
if [[ -z $tracking ]]; then
    printf 'host = "%s"\nport = %s\nallowed_hosts = ["%s"]\n' "$head" $((port + 2)) "$head" >"$folder/tracking.toml"
    tracking=$(dab ui --json | field tracking_uri)
    MLFLOW_TRACKING_PASSWORD=$(<"$folder/tracking_password")
    export MLFLOW_TRACKING_PASSWORD MLFLOW_TRACKING_USERNAME=dab
    trap 'dab cluster down >/dev/null; rm -f -- "$RAY_AUTH_TOKEN_PATH" "$folder/tracking.toml"' EXIT
fi

# Slurm says so three minutes before it ends the job: the run takes a checkpoint and stops.
stop() {
    if [[ -s $folder/run ]]; then
        echo "Slurm ends this job soon: stopping the run after a checkpoint"
        dab stop "$(<"$folder/run")" --tracking-uri "$tracking" || true
    fi
}
trap stop USR1 TERM

srun --no-kill --cpu-bind=none --ntasks-per-node=1 bash -c 'node "$@"' node "$head" "$gpus" &
step=$!
while kill -0 "$step" 2>/dev/null && [[ ! -e $folder/ended ]]; do
    sleep 2 &
    wait $! || true # not `sleep` alone: a signal would wait for it
done
sleep 20 &
wait $! || true # by now the head has stopped; the other nodes would look for it for a minute
kill -TERM "$step" 2>/dev/null || true
wait "$step" || true
srun --ntasks-per-node=1 rm -rf -- "/tmp/dab-$SLURM_JOB_ID" || true

ended=$(cat -- "$folder/ended" 2>/dev/null || echo "not started")
echo "run of job ${DAB_SLURM_JOB:-$SLURM_JOB_ID}: $ended; what it left is in $folder"
case $ended in
finished) exit 0 ;;
stopped)
    echo "to go on: this script again, with sbatch --export=ALL,DAB_SLURM_JOB=${DAB_SLURM_JOB:-$SLURM_JOB_ID}"
    exit 75
    ;;
*) exit 1 ;;
esac
