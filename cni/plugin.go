package cni

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"time"

	"github.com/containernetworking/cni/pkg/skel"
	"github.com/containernetworking/cni/pkg/types"
	current "github.com/containernetworking/cni/pkg/types/100"
	"github.com/containernetworking/cni/pkg/version"
)

// SpecVersions are the versions of the CNI specification that the plugin speaks.
var SpecVersions = []string{"0.3.1", "0.4.0", "1.0.0", "1.1.0"}

// Plugin carries out the verbs. The zero value uses the process's standard error and DefaultTimeout.
type Plugin struct {
	// Timeout of one verb; 0 means DefaultTimeout.
	Timeout time.Duration
	// Stderr takes the debug lines; nil means os.Stderr. Standard output belongs to results and errors alone.
	Stderr io.Writer
}

// Main runs the verb that the environment names, prints its result or its error as JSON on standard output, and
// returns the exit status. A panic becomes an error like any other.
func (p *Plugin) Main(about string) (status int) {
	defer func() {
		if r := recover(); r != nil {
			status = printError(types.NewError(types.ErrInternal, fmt.Sprintf("panic: %v", r), ""))
		}
	}()
	if os.Getenv("CNI_COMMAND") == "" {
		return printError(types.NewError(types.ErrInvalidEnvironmentVariables,
			"CNI_COMMAND: missing, expected ADD, DEL, CHECK, GC, STATUS or VERSION; container runtimes run this program, see --help", ""))
	}
	funcs := skel.CNIFuncs{Add: p.Add, Del: p.Del, Check: p.Check, GC: p.GC, Status: p.Status}
	if err := skel.PluginMainFuncsWithError(funcs, version.PluginSupports(SpecVersions...), about); err != nil {
		return printError(err)
	}
	return 0
}

func printError(e *types.Error) int {
	if err := e.Print(); err != nil {
		fmt.Fprintln(os.Stderr, "margay-cni: standard output:", err)
	}
	return 1
}

// Add attaches the container and prints the result.
func (p *Plugin) Add(args *skel.CmdArgs) error {
	conf, req, err := p.request(Add, args)
	if err != nil {
		return err
	}
	result := &current.Result{CNIVersion: current.ImplementedSpecVersion}
	if prev, err := prevResult(conf); err != nil {
		return err
	} else if prev != nil {
		result = prev
	}
	ns, err := openNetns(args.Netns)
	if err != nil {
		return err
	}
	defer ns.Close()
	resp, err := p.call(conf, req, ns)
	if err != nil {
		return err
	}
	if a := resp.Attachment; a == nil || !a.Address.Is4() && !a.Address6.Is6() {
		return types.NewError(types.ErrInternal, "answer of margay-agent: no attachment in it", "")
	}
	appendResult(result, req, resp.Attachment)
	return types.PrintResult(result, conf.CNIVersion)
}

// Del detaches the container. It succeeds when there is nothing to detach, and when the agent is away: then the agent
// finds the request in the queue.
func (p *Plugin) Del(args *skel.CmdArgs) error {
	conf, req, err := p.request(Del, args)
	if err != nil {
		return err
	}
	_, err = p.call(conf, req, nil)
	if errors.Is(err, ErrUnreachable) {
		if qerr := (Queue{Dir: conf.QueueDir}).Put(req); qerr != nil {
			return types.NewError(types.ErrTryAgainLater, err.Error(), qerr.Error())
		}
		p.debug(conf, "%v: DEL of %s queued in %s", err, req.ContainerID, conf.QueueDir)
		return nil
	}
	return err
}

// Check compares the attachment with the previous result.
func (p *Plugin) Check(args *skel.CmdArgs) error {
	conf, req, err := p.request(Check, args)
	if err != nil {
		return err
	}
	prev, err := prevResult(conf)
	if err != nil {
		return err
	}
	if prev == nil {
		return types.NewError(types.ErrInvalidNetworkConfig, "prevResult: missing, expected the result of ADD", "")
	}
	if req.Expect, err = expectation(prev, req); err != nil {
		return err
	}
	ns, err := openNetns(args.Netns)
	if err != nil {
		return err
	}
	defer ns.Close()
	_, err = p.call(conf, req, ns)
	return err
}

// GC removes the attachments of this network that the configuration does not list as valid.
func (p *Plugin) GC(args *skel.CmdArgs) error {
	conf, req, err := p.request(GC, args)
	if err != nil {
		return err
	}
	if conf.ValidAttachments == nil {
		return types.NewError(types.ErrInvalidNetworkConfig,
			"cni.dev/valid-attachments: missing, expected a list; an empty one removes every attachment", "")
	}
	req.Valid = conf.ValidAttachments
	_, err = p.call(conf, req, nil)
	return err
}

// Status tells whether the agent can serve an ADD.
func (p *Plugin) Status(args *skel.CmdArgs) error {
	conf, req, err := p.request(Status, args)
	if err != nil {
		return err
	}
	_, err = p.call(conf, req, nil)
	if errors.Is(err, ErrUnreachable) {
		return types.NewError(types.ErrPluginNotAvailable, err.Error(), "")
	}
	return err
}

func (p *Plugin) request(verb string, args *skel.CmdArgs) (*NetConf, *Request, error) {
	conf, err := ParseConf(args.StdinData)
	if err != nil {
		return nil, nil, err
	}
	req := &Request{Protocol: Protocol, Verb: verb, Network: conf.Name, ContainerID: args.ContainerID,
		IfName: args.IfName, Netns: args.Netns, MTU: conf.MTU}
	// Arguments that cannot be read must not keep a container from being deleted; the handle does not need them.
	if req.Pod, err = ParseArgs(args.Args); err != nil && verb == Add {
		return nil, nil, err
	}
	if verb == Add {
		if req.IPv4, req.IPv6, req.MAC, err = conf.addresses(req.Pod); err != nil {
			return nil, nil, err
		}
	}
	return conf, req, req.Validate()
}

func (p *Plugin) call(conf *NetConf, req *Request, ns *os.File) (*Response, error) {
	timeout := p.Timeout
	if timeout == 0 {
		timeout = DefaultTimeout
	}
	ctx, cancel := context.WithTimeout(context.Background(), timeout)
	defer cancel()
	start := time.Now()
	resp, err := Call(ctx, conf.Socket, req, ns)
	p.debug(conf, "%s %s %s: %v in %v", req.Verb, req.ContainerID, req.IfName, err, time.Since(start))
	switch {
	case errors.Is(err, ErrUnreachable) && req.Verb != Del && req.Verb != Status:
		return nil, types.NewError(types.ErrTryAgainLater, err.Error(), "")
	case err != nil:
		return nil, err
	case resp.Error != nil:
		return nil, resp.Error
	}
	return resp, nil
}

func (p *Plugin) debug(conf *NetConf, format string, args ...any) {
	if conf.LogLevel != "debug" {
		return
	}
	w := p.Stderr
	if w == nil {
		w = os.Stderr
	}
	fmt.Fprintf(w, "margay-cni: "+format+"\n", args...)
}

// openNetns opens the pod's namespace. The library checks only after ADD has run whether that is the plugin's own,
// when the harm is done, so it is checked here.
func openNetns(path string) (*os.File, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, types.NewError(types.ErrInvalidNetNS, "CNI_NETNS: "+err.Error(), "")
	}
	theirs, err := f.Stat()
	if err == nil {
		var ours os.FileInfo
		if ours, err = os.Stat("/proc/thread-self/ns/net"); err == nil && os.SameFile(theirs, ours) {
			err = errors.New(path + " is the plugin's own namespace, expected the container's")
		}
	}
	if err != nil {
		f.Close()
		return nil, types.NewError(types.ErrInvalidNetNS, "CNI_NETNS: "+err.Error(), "")
	}
	return f, nil
}

func prevResult(conf *NetConf) (*current.Result, error) {
	if conf.RawPrevResult == nil {
		return nil, nil
	}
	bad := func(err error) error {
		return types.NewError(types.ErrDecodingFailure, "prevResult: "+err.Error(), "")
	}
	if err := version.ParsePrevResult(&conf.PluginConf); err != nil {
		return nil, bad(err)
	}
	r, err := current.NewResultFromResult(conf.PrevResult)
	if err != nil {
		return nil, bad(err)
	}
	return r, nil
}

// appendResult adds our two interfaces, the addresses and the default routes to what earlier plugins of the chain said.
func appendResult(r *current.Result, req *Request, a *Attachment) {
	pod := len(r.Interfaces) + 1
	r.Interfaces = append(r.Interfaces,
		&current.Interface{Name: a.HostName, Mac: a.HostMAC},
		&current.Interface{Name: req.IfName, Mac: a.PodMAC, Sandbox: req.Netns})
	for _, f := range []struct{ addr, gateway netip.Addr }{{a.Address, a.Gateway}, {a.Address6, a.Gateway6}} {
		if !f.addr.IsValid() {
			continue
		}
		bits := f.addr.BitLen()
		r.IPs = append(r.IPs, &current.IPConfig{Interface: current.Int(pod),
			Address: net.IPNet{IP: f.addr.AsSlice(), Mask: net.CIDRMask(bits, bits)}})
		r.Routes = append(r.Routes, &types.Route{Dst: net.IPNet{IP: make(net.IP, bits/8), Mask: net.CIDRMask(0, bits)},
			GW: f.gateway.AsSlice()})
	}
}
