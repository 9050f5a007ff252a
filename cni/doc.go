// Package cni is the plugin's side of pod attachment: the network configuration, the CNI verbs, and the small JSON
// protocol by which the plugin asks the agent to do the work.
//
// The plugin is started once per verb, holds no secrets and touches no interface itself. It opens the pod's network
// namespace and hands the agent that file descriptor over the unix socket, so that the agent needs neither the
// runtime's mounts nor its process ids. What cannot reach the agent is, for DEL, left as a file in a directory that
// the agent empties: a DEL never fails because a daemon is away.
//
// Start reading at Plugin (plugin.go), then Request and Response (proto.go). The agent's side is cni/server.
package cni
