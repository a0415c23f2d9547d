#!/usr/bin/env bash
# Builds the image with Debian's buildah and a base by mmdebstrap, where no Docker and no image registry can be had, and
# runs it as Kubernetes would: nobody's root, its files read-only, /tmp alone writable, no network but its own loopback.
#
#   bash deploy/image.sh [FOLDER]        as root; FOLDER, build/image unless told, needs 30 GB with PyTorch's CUDA build
#
# INDEX_URL is the Dockerfile's. BUILD_OPTIONS are more options for buildah, a --volume with pip's configuration say.
set -euo pipefail
cd "$(dirname "$0")/.."
work=$(realpath -m "${1:-build/image}")
mkdir -p "$work"
export STORAGE_DRIVER=vfs BUILDAH_ISOLATION=chroot
images() { buildah --root "$work/storage" --runroot "$work/run" "$@"; }

if ! images inspect --type image emformer-asr-base >/dev/null 2>&1; then
  mmdebstrap --variant=minbase --include=python3,python3-venv,ca-certificates bookworm "$work/base.tar"
  base=$(images from scratch)
  images add --quiet "$base" "$work/base.tar" / >/dev/null
  images commit --quiet --rm "$base" emformer-asr-base >/dev/null
fi
started=$SECONDS
# shellcheck disable=SC2086
images bud --quiet --format docker --build-arg BASE=localhost/emformer-asr-base --build-arg INDEX_URL="${INDEX_URL:-}" \
  ${BUILD_OPTIONS:-} --tag emformer-asr . >/dev/null
echo "built in $((SECONDS - started)) s"

container=$(images from emformer-asr)
root=$(images mount "$container")
stop() {
  [ -z "${server:-}" ] || kill -KILL "$server" 2>/dev/null || true
  images rm "$container" >/dev/null
}
trap stop EXIT
inspected() { images inspect --format "$1" "$container"; }
user=$(inspected '{{.OCIv1.Config.User}}')
mapfile -t environment < <(inspected '{{range .OCIv1.Config.Env}}{{println .}}{{end}}' | sed '/^$/d')
mapfile -t command < <(inspected '{{range .OCIv1.Config.Cmd}}{{println .}}{{end}}' | sed '/^$/d')
du -sb "$root" | awk '{printf "size %.2f GB, ", $1 / 1e9}'
du -sb "$root/opt/venv" | awk '{printf "of which Python packages and Java %.2f GB\n", $1 / 1e9}'
for tool in gcc cc g++ make ld; do
  if PATH="$root/opt/venv/bin:$root/usr/bin:$root/bin" command -v "$tool"; then echo "there is a build tool" && exit 1; fi
done

# Process 1 of its own process, mount and network namespaces.
started=$(date +%s%N)
unshare --mount --pid --net --fork --kill-child bash -c '
  root=$1 user=$2; shift 2
  ip link set lo up
  mount --bind "$root" "$root" && mount -o remount,bind,ro "$root"
  mount -t tmpfs tmpfs "$root/tmp" && mount -t proc proc "$root/proc" && mount --rbind /dev "$root/dev"
  cd / && exec chroot --userspec="$user:$user" "$root" /usr/bin/env -i -C /srv/emformer-asr "$@"' \
  - "$root" "$user" "${environment[@]}" "${command[@]}" >"$work/container.log" 2>&1 &
server=$!
process() { pgrep -P "$server" | head -1; }
inside() { nsenter --target "$(process)" --net --pid --mount chroot --userspec="$user:$user" "$root" \
  /usr/bin/env -i -C /srv/emformer-asr "${environment[@]}" "$@"; }
ask() { nsenter --target "$(process)" --net curl --silent --fail --max-time 600 "$@"; }
until inside python ready.py 2>/dev/null; do
  kill -0 "$server" 2>/dev/null || { tail "$work/container.log"; exit 1; }
  sleep 0.5
done
echo "healthy after $((($(date +%s%N) - started) / 1000000)) ms, as user $(inside id -u)"
if inside touch /srv/emformer-asr/file 2>/dev/null; then echo "its files can be written" && exit 1; fi
inside touch /tmp/file
files=http://127.0.0.1:8080/predictions/emformer_asr
said=$(ask -T sample_audio/three-digits.wav -X POST $files)
[ "$said" = "four seven two" ] || { echo "heard: $said"; exit 1; }
live=$(tail -c +45 sample_audio/three-digits.wav | ask -X POST --data-binary @- -H 'Content-Type: application/octet-stream' \
  -H 'ts_request_sequence_id: one' -H 'x-piece: 0' -H 'x-last-piece: true' ${files}_live)
grep -q '"text": "four seven two"' <<<"$live" || { echo "heard: $live"; exit 1; }
ask http://127.0.0.1:8082/metrics | grep -q '^asr_requests'
echo "both archives hear four seven two; metrics are there; nothing but /tmp can be written"

# Nearly four minutes of sound are asked for; SIGTERM comes while they are being transcribed.
for _ in $(seq 100); do tail -c +45 sample_audio/three-digits.wav; done >"$work/pcm"
{ head -c 40 sample_audio/three-digits.wav; printf '\xff\xff\xff\xff'; cat "$work/pcm"; } >"$work/long.wav"
ask -T "$work/long.wav" -X POST $files >"$work/answer" &
asked=$!
sleep 1
started=$(date +%s%N)
kill -TERM "$(process)"
wait "$asked" || { echo "the request under way was not answered"; exit 1; }
answered=$(((${started} - $(date +%s%N)) / -1000000))
wait "$server" && ended=0 || ended=$?
server=
words=$(wc -w <"$work/answer")
echo "SIGTERM: $words words of the request under way after $answered ms; ended with $ended after $((($(date +%s%N) - started) / 1000000)) ms"
[ "$words" -gt 100 ]
