# Runs one workload and outlives the agent. $1 is the workload's directory, $2 its cgroup.procs or
# empty, the rest is the command. Whoever makes `claim` first runs, so a second start of the same
# workload does nothing. Signals to the group reach the command; this shell stays to write down how
# it ended.
directory=$1
cgroup=$2
shift 2
stopped=
trap stopped=1 TERM INT HUP QUIT USR1 USR2
mkdir "$directory/claim" 2>/dev/null || exit 0
[ -z "$cgroup" ] || echo 0 2>/dev/null >"$cgroup" || true
echo "$$" >"$directory/pid.new" && mv "$directory/pid.new" "$directory/pid"
code=143
if [ -z "$stopped" ]; then
    "$@" &
    child=$!
    while :; do
        wait "$child"
        code=$?
        kill -0 "$child" 2>/dev/null || break
    done
fi
echo "$code" >"$directory/status.new" && mv "$directory/status.new" "$directory/status"
