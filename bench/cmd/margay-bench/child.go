package main

import (
	"fmt"
	"net"
	"net/netip"
	"os"

	"github.com/spf13/cobra"

	"margay/bench/traffic"
)

// boardFile is the descriptor by which a child gets its board.
const boardFile = 3

// board opens the board that the benchmark has handed over.
func board() (*traffic.Board, error) {
	b, err := traffic.OpenBoard(os.NewFile(boardFile, "board"))
	if err != nil {
		return nil, fmt.Errorf("%w: this command is for the benchmark's own use", err)
	}
	return b, nil
}

// children are the commands by which the benchmark starts itself as generator or sink.
func children() []*cobra.Command {
	var (
		device, sourceMAC, destinationMAC, source, destination, profile string
		flows                                                           int
	)
	generator := &cobra.Command{Use: "generator", RunE: func(*cobra.Command, []string) error {
		b, err := board()
		if err != nil {
			return err
		}
		f := traffic.Frame{Flows: flows, Profile: traffic.Profile(profile)}
		if f.SourceMAC, err = net.ParseMAC(sourceMAC); err != nil {
			return err
		}
		if f.DestinationMAC, err = net.ParseMAC(destinationMAC); err != nil {
			return err
		}
		if f.Source, err = netip.ParseAddr(source); err != nil {
			return err
		}
		if f.Destination, err = netip.ParseAddr(destination); err != nil {
			return err
		}
		if f.Profile == traffic.SmallXDP {
			g, err := traffic.NewXDPGenerator(device, f, b)
			if err != nil {
				return err
			}
			return g.Run()
		}
		if x, err := traffic.NewXSKGenerator(device, f, b); err == nil {
			return x.Run()
		}
		b.Plain.Store(1) // what keeps AF_XDP from working would keep a path from working that wants it, and that says why
		g, err := traffic.NewGenerator(device, f, b)
		if err != nil {
			return err
		}
		return g.Run()
	}}
	sink := &cobra.Command{Use: "sink", RunE: func(*cobra.Command, []string) error {
		b, err := board()
		if err != nil {
			return err
		}
		s, err := traffic.NewSink(device, b)
		if err != nil {
			return err
		}
		return s.Run()
	}}
	receiver := &cobra.Command{Use: "bulk-receiver", RunE: func(*cobra.Command, []string) error {
		b, err := board()
		if err != nil {
			return err
		}
		return traffic.ReceiveBulk(b)
	}}
	sender := &cobra.Command{Use: "bulk-sender", RunE: func(*cobra.Command, []string) error {
		b, err := board()
		if err != nil {
			return err
		}
		to, err := netip.ParseAddr(destination)
		if err != nil {
			return err
		}
		return traffic.SendBulk(to, flows, b)
	}}
	for _, c := range []*cobra.Command{generator, sink} {
		c.Flags().StringVar(&device, "device", "eth0", "")
	}
	for _, c := range []*cobra.Command{generator, sender} {
		c.Flags().StringVar(&destination, "destination", "", "")
		c.Flags().IntVar(&flows, "flows", 1, "")
	}
	f := generator.Flags()
	f.StringVar(&sourceMAC, "source-mac", "", "")
	f.StringVar(&destinationMAC, "destination-mac", "", "")
	f.StringVar(&source, "source", "", "")
	f.StringVar(&profile, "profile", string(traffic.Small), "")
	all := []*cobra.Command{generator, sink, receiver, sender}
	for _, c := range all {
		c.Hidden, c.Args = true, cobra.NoArgs
	}
	return all
}
