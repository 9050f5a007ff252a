// Package interop holds the vRouter up against the real thing: the ipip module of a Linux kernel, as the other node. The
// kernels that build machines run often lack it, so a Debian kernel runs in a virtual machine; `make interop-kernel` does
// it all. Without the build tag interop there is nothing here.
package interop
