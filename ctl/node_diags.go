package ctl

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"github.com/spf13/cobra"
)

// diagTimeout bounds one command of `node diags`: one that hangs must not keep the rest.
const diagTimeout = 20 * time.Second

// diagLimit bounds one file of the archive, in bytes; of a longer log the end is kept.
const diagLimit = 32 << 20

// diagCommands are asked about the node. What is not installed is noted, and no error.
var diagCommands = []struct{ info, file, command string }{
	{"date and kernel", "date", "date --utc --rfc-3339=seconds"},
	{"", "hostname", "hostname"},
	{"", "uname", "uname -a"},
	{"interfaces", "links", "ip -d -s link show"},
	{"", "ipv4_addr", "ip -4 addr show"},
	{"", "ipv6_addr", "ip -6 addr show"},
	{"routes, rules and neighbours", "ipv4_route", "ip -4 route show table all"},
	{"", "ipv6_route", "ip -6 route show table all"},
	{"", "rules", "ip rule show"},
	{"", "neighbours", "ip neigh show"},
	{"nftables", "nft_ruleset", "nft -n -a list ruleset"},
	{"queueing disciplines and filters", "qdiscs", "tc -s qdisc show"},
	{"sockets", "ss", "ss -a -n -p"},
	{"processes", "processes", "ps -eo pid,ppid,stat,rss,pcpu,etime,args --sort=pid"},
	{"journal of the daemons", "journal_vrouter", "journalctl -u vrouter.service --no-pager -n 20000"},
	{"", "journal_margay_agent", "journalctl -u margay-agent.service --no-pager -n 20000"},
}

// diagFiles are read as they are.
var diagFiles = []string{"/proc/version", "/proc/cmdline", "/proc/meminfo", "/proc/cpuinfo", "/proc/softirqs", "/proc/interrupts", "/proc/net/snmp",
	"/proc/net/netstat", "/proc/net/softnet_stat", "/proc/sys/net/ipv4/ip_forward", "/proc/sys/net/core/rmem_max", "/proc/sys/net/core/wmem_max",
	"/etc/cni/net.d/10-margay.conflist"}

// diags is an archive in the making.
type diags struct {
	Saved     string   `json:"file"`
	Collected []string `json:"collected"`
	Failed    []string `json:"failed,omitempty"` // with the reason

	say io.Writer
	tar *tar.Writer
}

func newNodeDiagsCommand() *cobra.Command {
	var logDir, file, output string
	cmd := &cobra.Command{
		Use:   "diags",
		Short: "Gather what is needed to find a fault of this node into one archive",
		Long: `Gather what is needed to find a fault of this node into one archive (.tar.gz): the daemons' status, tables and counters, the
kernel's interfaces, routes and nftables, logs, and the cluster's resources where the datastore answers. What cannot be had is
noted in the archive's "failed" and is no error. Run it as root, or half of it is missing. Read what is in it before you give
it away: it holds addresses, names of pods and the command lines of processes.`,
		Example: "  margayctl node diags\n  margayctl node diags --file /tmp/node1.tar.gz",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := checkOutput(output, "text", "json"); err != nil {
				return err
			}
			d := &diags{Saved: file, say: cmd.OutOrStdout()}
			if d.Saved == "" {
				d.Saved = filepath.Join(os.TempDir(), "margay-diags-"+time.Now().UTC().Format("20060102_150405")+".tar.gz")
			}
			if output == "json" {
				d.say = cmd.ErrOrStderr() // progress; standard output is the result's
			}
			if err := d.write(cmd, logDir); err != nil {
				return fmt.Errorf("diags: %w", err)
			}
			if output == "json" {
				return printJSON(cmd.OutOrStdout(), d)
			}
			fmt.Fprintf(d.say, "\n%d files collected, %d could not be had.\nDiags saved to %s\n", len(d.Collected), len(d.Failed), d.Saved)
			return nil
		},
	}
	cmd.Flags().StringVar(&logDir, "log-dir", "/var/log/margay", "a directory of the daemons' logs")
	cmd.Flags().StringVar(&file, "file", "", "the archive to write (default margay-diags-TIME.tar.gz among the temporary files)")
	addOutput(cmd, &output, "text", "text or json")
	return cmd
}

// write collects everything. Only an archive that cannot be written is an error, and then there is none.
func (d *diags) write(cmd *cobra.Command, logDir string) (err error) {
	// Not readable by others: it tells a lot about the node. An archive that is there already is not overwritten.
	out, err := os.OpenFile(d.Saved, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			_ = os.Remove(d.Saved)
		}
	}()
	zip := gzip.NewWriter(out)
	d.tar = tar.NewWriter(zip)
	err = d.collect(cmd, logDir)
	return errors.Join(err, d.tar.Close(), zip.Close(), out.Close())
}

func (d *diags) collect(cmd *cobra.Command, logDir string) error {
	fmt.Fprintln(d.say, "Collecting diagnostics")
	ctx := cmd.Context()
	for _, c := range diagCommands {
		d.dumping(c.info)
		if err := d.command(ctx, c.file, c.command); err != nil {
			return err
		}
	}
	for _, name := range diagFiles {
		if err := d.copy(strings.TrimPrefix(name, "/"), name); err != nil {
			return err
		}
	}
	d.dumping("the daemons' status, tables and counters")
	for _, args := range [][]string{{"version"}, {"node", "status"}, {"node", "routes"}, {"node", "counters", "--all"}} {
		name := "margay/" + strings.Join(args[:min(len(args), 2)], "_") + ".json"
		if err := d.margayctl(cmd, name, append(args, "-o", "json")...); err != nil {
			return err
		}
	}
	d.dumping("the cluster's resources")
	if err := d.margayctl(cmd, "margay/resources.yaml", "export"); err != nil {
		return err
	}
	if err := d.margayctl(cmd, "margay/ipam.json", "ipam", "show", "-o", "json"); err != nil {
		return err
	}
	d.dumping("logs")
	if err := d.logs(logDir); err != nil {
		return err
	}
	return d.add("failed", []byte(strings.Join(append(d.Failed, ""), "\n")))
}

func (d *diags) dumping(what string) {
	if what != "" {
		fmt.Fprintln(d.say, "Dumping", what)
	}
}

// command runs one command; what it said is kept also when it failed.
func (d *diags) command(ctx context.Context, file, command string) error {
	ctx, cancel := context.WithTimeout(ctx, diagTimeout)
	defer cancel()
	argv := strings.Fields(command)
	c := exec.CommandContext(ctx, argv[0], argv[1:]...)
	c.WaitDelay = time.Second // a child of its that holds the output open must not hold us
	out, err := c.CombinedOutput()
	if err != nil {
		d.failed(file, fmt.Errorf("%s: %w", command, err))
		if len(out) == 0 {
			return nil
		}
	}
	return d.add(file, out)
}

// margayctl runs a command of our own, with the datastore and the sockets that this one was told of.
func (d *diags) margayctl(parent *cobra.Command, file string, args ...string) error {
	var out bytes.Buffer
	cmd := NewCommand()
	if config, err := parent.Flags().GetString("config"); err == nil && config != "" {
		args = append(args, "--config", config)
	}
	cmd.SetArgs(args)
	cmd.SetOut(&out)
	cmd.SetErr(io.Discard)
	if err := cmd.ExecuteContext(parent.Context()); err != nil {
		d.failed(file, err)
	}
	if out.Len() == 0 {
		return nil
	}
	return d.add(file, out.Bytes())
}

// copy takes one file, or the end of a long one.
func (d *diags) copy(as, name string) error {
	content, err := tail(name, diagLimit)
	if err != nil {
		d.failed(as, err)
		return nil
	}
	return d.add(as, content)
}

// logs takes the files under the log directory, of which there may be none.
func (d *diags) logs(dir string) error {
	return filepath.WalkDir(dir, func(path string, entry fs.DirEntry, err error) error {
		if err != nil {
			d.failed("logs", err)
			return nil
		}
		if !entry.Type().IsRegular() {
			return nil
		}
		rel, err := filepath.Rel(dir, path)
		if err != nil {
			return err
		}
		return d.copy(filepath.Join("logs", rel), path)
	})
}

// tail reads at most the last limit bytes of a file. Files of /proc have no size: they are read from the beginning.
func tail(name string, limit int64) ([]byte, error) {
	f, err := os.Open(name)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	if info, err := f.Stat(); err == nil && info.Size() > limit {
		if _, err := f.Seek(-limit, io.SeekEnd); err != nil {
			return nil, err
		}
	}
	return io.ReadAll(io.LimitReader(f, limit))
}

func (d *diags) failed(file string, err error) {
	d.Failed = append(d.Failed, fmt.Sprintf("%s: %s", file, strings.ReplaceAll(err.Error(), "\n", "; ")))
}

// add puts one file into the archive.
func (d *diags) add(name string, content []byte) error {
	content = content[max(0, len(content)-diagLimit):]
	err := d.tar.WriteHeader(&tar.Header{Name: "diagnostics/" + filepath.ToSlash(name), Mode: 0o600, Size: int64(len(content)), ModTime: time.Now()})
	if err == nil {
		_, err = d.tar.Write(content)
	}
	if err == nil && name != "failed" {
		d.Collected = append(d.Collected, name)
	}
	return err
}
