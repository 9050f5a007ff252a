// Command margay-cni is the CNI plugin that a container runtime executes. It asks margay-agent to do the work.
package main

import (
	"fmt"
	"os"
	"strings"

	"margay/cni"
	"margay/internal/version"
)

const help = `margay-cni is Margay's CNI plugin. Container runtimes execute it; it asks margay-agent to attach and detach pods.

Usage:
  margay-cni            run the verb that the environment names, configuration on standard input
  margay-cni --version  print the version
  margay-cni --help     print this text

Environment (CNI specification 1.1.0, section 2):
  CNI_COMMAND           ADD, DEL, CHECK, GC, STATUS or VERSION
  CNI_CONTAINERID, CNI_NETNS, CNI_IFNAME, CNI_ARGS, CNI_PATH
  CNI_ARGS keys         K8S_POD_NAMESPACE, K8S_POD_NAME, K8S_POD_UID, IP (ask for this address); others are ignored

Configuration, a file in /etc/cni/net.d:
  {"cniVersion": "1.0.0", "name": "k8s-pod-network",
   "plugins": [{"type": "margay", "socket": %q, "queueDir": %q}]}
  socket                margay-agent's socket
  queueDir              where DELs wait while margay-agent is away
  mtu                   of the pod's interface, in bytes; default: the underlay's minus the encapsulation
  ipam.ipv4_pools       names or prefixes of the pools to choose from; default: any
  logLevel              "debug" tells on standard error what was asked and how long it took

Versions of the CNI specification: %s
`

func main() {
	if len(os.Args) > 1 {
		os.Exit(flags(os.Args[1:]))
	}
	p := &cni.Plugin{}
	os.Exit(p.Main(version.Line("margay-cni")))
}

// flags serves people; a runtime passes no arguments.
func flags(args []string) int {
	switch args[0] {
	case "--version", "-v", "version":
		fmt.Println(version.Line("margay-cni"))
	case "--help", "-h", "help":
		fmt.Printf(help, cni.DefaultSocket, cni.DefaultQueueDir, strings.Join(cni.SpecVersions, ", "))
	default:
		fmt.Fprintf(os.Stderr, "margay-cni: %q: unknown argument, expected none, --version or --help\n", args[0])
		return 1
	}
	return 0
}
