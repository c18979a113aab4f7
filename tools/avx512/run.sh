#!/usr/bin/env bash
# Runs one test binary on an emulated processor with AVX-512. README.md beside this file says what it needs.
#
#     tools/avx512/run.sh TEST-BINARY [its arguments]
#
# MODEL names a processor of Bochs, TOOLS the folder with Bochs and the unpacked packages.
set -euo pipefail

repo=$(cd "$(dirname "$0")/../.." && pwd)
tools=${TOOLS:-$repo/target/avx512}
model=${MODEL:-sapphire_rapids}
binary=${1:?a test binary, such as target/release/deps/engraft_tensor-0123456789abcdef}
shift
packages=$tools/packages
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# What the machine boots: busybox, the binary with its libraries, and the fixtures where the binary looks for them.
root=$work/root
mkdir -p "$root"/{bin,dev,proc,tmp} "$root$repo/tests" "$root$repo/crates"
(cd "$repo" && for crate in crates/*; do mkdir "$root$repo/$crate"; done)
cp -r "$repo/tests/golden" "$root$repo/tests/"
cp "$packages/bin/busybox" "$root/bin/"
strip -o "$root/bin/test" "$binary"
ldd "$binary" | grep -o '/[^ ]*' | while read -r library; do install -D "$library" "$root$library"; done
cat > "$root/init" <<END
#!/bin/busybox sh
/bin/busybox mount -t proc proc /proc
/bin/busybox mount -t devtmpfs dev /dev
/bin/busybox mount -t tmpfs tmp /tmp
/bin/busybox grep -m1 'model name' /proc/cpuinfo
/bin/busybox grep -m1 -o 'avx512_bf16' /proc/cpuinfo
cd '$repo/crates/tensor'
/bin/test --test-threads=1 $(printf '%q ' "$@")
/bin/busybox echo "status \$?"
/bin/busybox sleep 1
/bin/busybox poweroff -f
END
chmod +x "$root/init"

# clearcpuid=580: the kernel believes that `rep movsb` is fast for short copies (FSRM) though Bochs has switched fast
# strings off, and its memmove, which then skips the check of the length, overwrites it.
iso=$work/iso
mkdir -p "$iso"/{boot,isolinux}
(cd "$root" && find . | cpio -o -H newc --quiet | gzip -1 > "$iso/boot/initrd")
cp "$packages"/boot/vmlinuz-* "$iso/boot/vmlinuz"
cp "$packages/usr/lib/ISOLINUX/isolinux.bin" "$packages/usr/lib/syslinux/modules/bios/ldlinux.c32" "$iso/isolinux/"
cat > "$iso/isolinux/isolinux.cfg" <<END
DEFAULT linux
LABEL linux
 KERNEL /boot/vmlinuz
 APPEND initrd=/boot/initrd console=ttyS0 quiet loglevel=3 nokaslr mitigations=off tsc=reliable clearcpuid=580
END
xorriso -as mkisofs -quiet -o "$work/test.iso" -b isolinux/isolinux.bin -c isolinux/boot.cat \
    -no-emul-boot -boot-load-size 4 -boot-info-table "$iso" 2> /dev/null

bios=$tools/bochs/bios
cat > "$work/bochsrc" <<END
cpu: model=$model, count=1, ips=50000000
memory: guest=2048, host=2048
romimage: file=$bios/BIOS-bochs-latest
vgaromimage: file=$bios/VGABIOS-lgpl/VGABIOS-lgpl-latest.bin
ata0-master: type=cdrom, path=$work/test.iso, status=inserted
boot: cdrom
com1: enabled=1, mode=file, dev=$work/serial
display_library: nogui
clock: sync=none, time0=utc
log: $work/log
panic: action=fatal
error: action=ignore
info: action=ignore
END
touch "$work/serial"
"$tools/bochs/bochs" -q -f "$work/bochsrc" > "$work/stdout" 2>&1 < /dev/null &
tail -f --pid=$! -s 1 "$work/serial"
grep -q '^status 0' "$work/serial"
