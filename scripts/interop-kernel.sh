#!/usr/bin/env bash
# Puts a Debian kernel and the modules that the interoperability test needs into the directory $1, unless they are there:
# downloaded and unpacked, not installed. Installs QEMU if it is missing. Needs root on Debian.
set -euo pipefail
dir=$1
if [ -e "$dir/vmlinuz" ] && [ -e "$dir/ipip.ko" ]; then
  exit 0
fi
if ! command -v apt-get >/dev/null; then
  echo "interop-kernel: no apt-get: put vmlinuz and the modules $0 lists into $dir yourself" >&2
  exit 1
fi
export DEBIAN_FRONTEND=noninteractive
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
run() {
  if ! "$@" >"$tmp/log" 2>&1; then
    tail -n 20 "$tmp/log" >&2
    echo "interop-kernel: $1 failed; its last lines are above" >&2
    exit 1
  fi
}
run apt-get update -q
command -v qemu-system-x86_64 >/dev/null || run apt-get install -y -q --no-install-recommends qemu-system-x86
# The metapackage names the present kernel of this release of Debian; the cloud one is the smallest.
package=$(apt-cache depends linux-image-cloud-amd64 | awk '/Depends: linux-image/ {print $2; exit}')
cd "$tmp"
run apt-get download "$package"
run dpkg-deb -x "$package"_*.deb unpacked
mkdir -p "$dir"
# Debian 12 ships plain modules, later ones compress them.
modules=(failover net_failover virtio virtio_ring virtio_pci_modern_dev virtio_pci_legacy_dev virtio_pci virtio_net tunnel4 ip_tunnel ipip)
for m in "${modules[@]}"; do
  found=$(find unpacked \( -name "$m.ko" -o -name "$m.ko.xz" \) -print -quit)
  case $found in
    *.xz) xz -dc "$found" >"$dir/$m.ko" ;;
    *.ko) cp "$found" "$dir/$m.ko" ;;
    *) echo "interop-kernel: $package has no module $m: taken as built in" >&2 ;;
  esac
done
cp unpacked/boot/vmlinuz-* "$dir/vmlinuz"
echo "interop-kernel: $package in $dir"
