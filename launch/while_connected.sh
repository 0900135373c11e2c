#!/bin/sh
# Runs a command until standard input ends, as it does when the connection that brought this script is gone.
# Usage: while_connected.sh COMMAND...
exec 3<&0
setsid "$@" </dev/null 3<&- &
command=$!
{
    read -r _ <&3
    kill -TERM "-$command" || kill -TERM "$command" # before setsid there is no group
} &
watch=$!
wait "$command"
status=$?
kill "$watch" 2>/dev/null
exit "$status"
