package lab

import (
	"fmt"
	"io"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// progress tells a person how far we are: one line a step, with its time; on a terminal also the step under way.
type progress struct {
	w   io.Writer
	tty bool
}

func newProgress(w io.Writer) progress {
	if w == nil {
		w = io.Discard
	}
	p := progress{w: w}
	if f, ok := w.(*os.File); ok {
		_, err := unix.IoctlGetTermios(int(f.Fd()), unix.TCGETS)
		p.tty = err == nil
	}
	return p
}

// step runs f and reports it under the given name; f may return a detail to add to the line.
func (p progress) step(name string, f func() (detail string, err error)) error {
	if p.tty {
		fmt.Fprintf(p.w, "… %s", name)
	}
	begin := time.Now()
	detail, err := f()
	mark := "✓"
	if err != nil {
		mark = "✗"
	}
	if detail != "" {
		detail = ": " + detail
	}
	start := ""
	if p.tty {
		start = "\r\x1b[K"
	}
	fmt.Fprintf(p.w, "%s%s %s%s (%.1f s)\n", start, mark, name, detail, time.Since(begin).Seconds())
	return err
}

// say prints one line.
func (p progress) say(format string, args ...any) { fmt.Fprintf(p.w, format+"\n", args...) }
