package port

import "golang.org/x/sys/unix"

// OpenSplitUnderlay is OpenOffloadUnderlay where the kernel allows no BPF.
func OpenSplitUnderlay() (*Underlay, error) {
	return openOffloadUnderlay(func() (*retag, error) { return nil, explainBPF("load the BPF program", unix.EPERM) })
}
