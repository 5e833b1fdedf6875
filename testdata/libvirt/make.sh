#!/bin/sh
# Makes the documents in read/ that start with a digit, by libvirt's in-memory driver. Needs virsh; no daemon, no root.
# Creation times are those of the making.
set -eu
cd "$(dirname "$0")"
work=$(mktemp -d)
trap 'rm -r "$work"' EXIT
disk() {
    printf "<disk type='file' device='disk'><driver name='qemu' type='qcow2'/><source file='/images/%s'/>" "$1"
    printf "<target dev='%s' bus='virtio'/></disk>" "$2"
}
cat >"$work/node.xml" <<END
<node><domain type='test'><name>vm</name><uuid>0c5d1b1e-95b0-4a6b-8a3b-2f4e6f0a7c11</uuid>
<metadata><note:of-ours xmlns:note='urn:example:note' kept='yes'>a &amp; b</note:of-ours></metadata>
<memory unit='MiB'>16</memory><vcpu>1</vcpu><os><type arch='x86_64'>hvm</type></os><devices>
$(disk system.qcow2 vda) $(disk data.qcow2 vdb)
<disk type='file' device='cdrom'><target dev='sda' bus='sata'/><readonly/></disk></devices>
<test:runstate xmlns:test='http://libvirt.org/schemas/domain/test/1.0'>5</test:runstate></domain></node>
END
external="--diskspec vda,snapshot=external,file=/images/system.full --diskspec vdb,snapshot=external,file=/images/data.full"
virsh -q -c "test://$work/node.xml" "
snapshot-create-as vm clean 'after install & <updates>'
snapshot-create-as vm 'branch b'
snapshot-revert vm clean
snapshot-create-as vm patched
start vm
snapshot-create-as vm live
suspend vm
snapshot-create-as vm paused \"it's \\\"paused\\\"\"
resume vm
snapshot-create-as vm full --memspec file=/images/full.mem $external
snapshot-dumpxml vm clean; echo '=1-clean'
snapshot-dumpxml vm 'branch b'; echo '=2-branch-b'
snapshot-dumpxml vm patched; echo '=3-patched'
snapshot-dumpxml vm live; echo '=4-live'
snapshot-dumpxml vm paused; echo '=5-paused'
snapshot-dumpxml vm full; echo '=6-full'
dumpxml vm; echo '=7-domain'
" | awk '
    # A name stands behind its document, and the next document in the same line.
    /^=/ {
        split(substr($0, 2), part, "<")
        file = "read/" part[1] ".xml"
        for (i = 1; i <= count; i++) print lines[i] >file
        close(file)
        count = 0
        $0 = substr($0, 2 + length(part[1]))
    }
    length($0) { lines[++count] = $0 }
'
