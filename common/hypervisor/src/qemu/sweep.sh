# Tidies up behind a test that is killed: waits until the test process is gone (its end of the standard input closes, whatever
# ended it), then ends the processes whose command line names a file in the test's folder, and removes the folder.
case "$1" in /*/*) ;; *) exit 2 ;; esac
while read -r _; do :; done
for process in /proc/[0-9]*; do
    if tr '\0' ' ' <"$process/cmdline" 2>/dev/null | grep -qF -- "$1/"; then
        kill -9 "${process#/proc/}"
    fi
done
rm -rf -- "$1"
