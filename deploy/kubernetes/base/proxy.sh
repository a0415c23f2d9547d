#!/bin/sh
# Starts nginx with deploy/nginx.conf, changed for pods: it listens to others, writes to one folder, and chooses among
# the pods that the headless Service names. All pieces of a live sequence go to one of them: consistent hashing gives
# each proxy the same answer, and of the sequences only those move whose pod has gone.
#
#   proxy.sh nginx.conf FOLDER [SERVERS [RESOLVER [PORT]]]
set -eu
servers=${3:-server emformer-asr-pods:8080 resolve;}
resolver=${4-resolver $(awk '$1 == "nameserver" {print $2; exit}' /etc/resolv.conf) valid=5s;}
port=${5:-0.0.0.0:8000}
mkdir -p "$2/build/proxy"
sed -E \
  -e "s|^( *)listen 127\.0\.0\.1:8000;|\1listen $port;|" -e '/listen \[::1\]:8000;/d' \
  -e 's|^error_log .*|error_log stderr;|' -e 's|^( *)access_log .*|\1access_log /dev/stdout;|' \
  -e "s|^( *)upstream torchserve \{|\1$resolver\n\1upstream live {\n\1    zone live 256k;\n\1    hash \$http_ts_request_sequence_id consistent;\n\1    $servers\n\1    keepalive 16;\n\1}\n&\n\1    zone files 256k;\n\1    least_conn;|" \
  -e "s|^( *)server 127\.0\.0\.1:8080;|\1$servers|" \
  -e 's|proxy_pass http://torchserve/predictions/emformer_asr_live;|proxy_pass http://live/predictions/emformer_asr_live;|' \
  -e 's|client_body_timeout|keepalive_timeout 15s;\n        &|' \
  "$1" >"$2/nginx.conf"
exec nginx -p "$2" -c "$2/nginx.conf" -e stderr -g 'daemon off;'
