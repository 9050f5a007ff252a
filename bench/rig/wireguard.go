package rig

import (
	"context"
	"crypto/ecdh"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync/atomic"
	"time"

	"github.com/vishvananda/netlink"
)

// wireguardSockets is where wireguard-go has the sockets by which it is configured, whatever the namespace.
const wireguardSockets = "/var/run/wireguard"

// nextBed numbers the beds of this process.
var nextBed atomic.Int32

// wireguard runs wireguard-go on node i: the second node's call finds the first's key, and joins the two.
func (b *Bed) wireguard(ctx context.Context, i int) error {
	key, err := ecdh.X25519().GenerateKey(rand.Reader)
	if err != nil {
		return err
	}
	b.keys = append(b.keys, key)
	// The socket's name must be nobody else's on this machine, and the device has the same.
	name := fmt.Sprintf("%s-w%d%d", runName(os.Getpid()), nextBed.Load(), i)
	b.tunnels = append(b.tunnels, name)
	node := b.nodes[i-1]
	cmd := exec.Command(b.options.WireGuard, "-f", name)
	cmd.Env = append(os.Environ(), "LOG_LEVEL=error")
	d, err := b.start(node, cmd)
	if err != nil {
		return err
	}
	b.carriers = append(b.carriers, d)
	socket := filepath.Join(wireguardSockets, name+".sock")
	err = d.await(ctx, "wireguard-go", func() error {
		_, err := os.Stat(socket)
		return err
	})
	if err != nil {
		return err
	}
	err = node.Do(func() error {
		link, err := netlink.LinkByName(name)
		if err != nil {
			return err
		}
		return errors.Join(
			netlink.LinkSetMTU(link, b.Path.mtu()),
			linkUp(name, ownAddress(i)+"/32"),
			route(name, podBlock(3-i), "", ownAddress(i)),
		)
	})
	if err != nil || i == 1 {
		return err
	}
	for _, n := range []int{1, 2} {
		request := fmt.Sprintf("set=1\nprivate_key=%x\nlisten_port=51820\npublic_key=%x\nendpoint=%s:51820\nallowed_ip=%s\n\n",
			b.keys[n-1].Bytes(), b.keys[2-n].PublicKey().Bytes(), nodeAddress(3-n), pool)
		if err := configure(filepath.Join(wireguardSockets, b.tunnels[n-1]+".sock"), request); err != nil {
			return fmt.Errorf("configure wireguard-go: %w", err)
		}
	}
	return nil
}

// configure speaks wireguard-go's configuration protocol: lines of key=value, ended by an empty one.
func configure(socket, request string) error {
	c, err := net.DialTimeout("unix", socket, patience)
	if err != nil {
		return err
	}
	defer c.Close()
	if err := c.SetDeadline(time.Now().Add(patience)); err != nil {
		return err
	}
	if _, err := io.WriteString(c, request); err != nil {
		return err
	}
	answer := make([]byte, 256)
	n, err := c.Read(answer)
	if err != nil {
		return err
	}
	if text := strings.TrimSpace(string(answer[:n])); text != "errno=0" {
		return fmt.Errorf("it answered %q", text)
	}
	return nil
}
