package cluster

import (
	"os"
	"os/exec"
	"regexp"
	"strings"
	"testing"
)

// TestReadmeCommands runs the block "The same cluster by hand" of both READMEs as it stands, line by line in one
// shell, in a lab of another name.
func TestReadmeCommands(t *testing.T) {
	for _, file := range []string{"README.md", "README.ko.md"} {
		t.Run(file, func(t *testing.T) {
			text, err := os.ReadFile("../../" + file)
			if err != nil {
				t.Fatal(err)
			}
			_, block, ok := strings.Cut(string(text), "```\nmake build\n")
			block, _, ok2 := strings.Cut(block, "```")
			if !ok || !ok2 || strings.Count(block, "\n") < 8 {
				t.Fatal("the block that begins with `make build` is not there")
			}
			name := labName + "r"
			block = regexp.MustCompile(`margayctl lab (\w+)`).ReplaceAllString(block, "margayctl lab $1 --name "+name)
			block = strings.ReplaceAll(block, "lab-node1", name+"-node1")
			t.Cleanup(func() { _, _ = ctl("lab", "down", "--name", name) }) // only there where a line failed
			cmd := exec.Command("bash", "-euxo", "pipefail", "-c", block)
			cmd.Dir = "../.."
			if out, err := cmd.CombinedOutput(); err != nil {
				t.Errorf("%v\n%s", err, out)
			}
		})
	}
}
