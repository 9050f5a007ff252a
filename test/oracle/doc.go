// Package oracle holds the Linux kernel up against the vRouter: the same packets go to a router that is the kernel and
// nothing else, and to a node on which the vRouter does its part, and what comes out is compared byte for byte. What may
// differ is written down in docs/router.md, with the clause of the RFC that leaves the choice.
package oracle
