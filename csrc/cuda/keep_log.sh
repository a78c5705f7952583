# Compiler launcher: runs the command and keeps what it says beside the object, as <object>.log. What ptxas says of
# registers is no message for people; everything else is passed on.
for argument; do
  [ "$previous" = -o ] && object=$argument
  previous=$argument
done
"$@" >"$object.log" 2>&1
status=$?
if [ $status -ne 0 ]; then
  cat "$object.log" >&2
else
  grep -E 'warning|error' "$object.log" >&2
fi
exit $status
