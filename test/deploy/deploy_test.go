// Package deploy checks what is in deploy/ as far as it can be without a cluster: the manifests strictly against
// Kubernetes' own types, their references to each other, and the commands that they run. That the capabilities are
// enough, and what happens without each, test/cluster shows on real daemons.
package deploy

import (
	"bytes"
	"encoding/json"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/util/validation"
	"sigs.k8s.io/yaml"

	"margay/cni"
	"margay/ctl"
)

// manifests are all objects of deploy/, by "Kind/name".
func manifests(t *testing.T) map[string]any {
	t.Helper()
	found := map[string]any{}
	for _, file := range []string{"../../deploy/margay.yaml", "../../deploy/margayctl.yaml"} {
		text, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		for doc := range bytes.SplitSeq(text, []byte("\n---\n")) {
			var head struct {
				Kind     string
				Metadata struct{ Name, Namespace string }
			}
			if err := yaml.Unmarshal(doc, &head); err != nil {
				t.Fatalf("%s: %v", file, err)
			}
			var obj any
			switch head.Kind {
			case "ConfigMap":
				obj = new(corev1.ConfigMap)
			case "ServiceAccount":
				obj = new(corev1.ServiceAccount)
			case "Pod":
				obj = new(corev1.Pod)
			case "DaemonSet":
				obj = new(appsv1.DaemonSet)
			default:
				t.Fatalf("%s: kind %q: nobody checks it", file, head.Kind)
			}
			if err := yaml.UnmarshalStrict(doc, obj); err != nil {
				t.Errorf("%s: %s: %v", file, head.Kind, err)
			}
			if head.Metadata.Namespace != "kube-system" || len(validation.IsDNS1123Subdomain(head.Metadata.Name)) > 0 {
				t.Errorf("%s: %s %s/%s", file, head.Kind, head.Metadata.Namespace, head.Metadata.Name)
			}
			found[head.Kind+"/"+head.Metadata.Name] = obj
		}
	}
	return found
}

// podSpecs are the pods that deploy/ makes.
func podSpecs(t *testing.T) map[string]corev1.PodSpec {
	t.Helper()
	all := manifests(t)
	set, pod := all["DaemonSet/margay-node"].(*appsv1.DaemonSet), all["Pod/margayctl"].(*corev1.Pod)
	if set == nil || pod == nil {
		t.Fatalf("deploy/ holds %v", all)
	}
	if label := set.Spec.Selector.MatchLabels["k8s-app"]; label == "" || label != set.Spec.Template.Labels["k8s-app"] {
		t.Error("the DaemonSet does not select its own pods")
	}
	return map[string]corev1.PodSpec{"margay-node": set.Spec.Template.Spec, "margayctl": pod.Spec}
}

func TestReferences(t *testing.T) {
	config := manifests(t)["ConfigMap/margay-config"].(*corev1.ConfigMap)
	for name, spec := range podSpecs(t) {
		var volumes []string
		for _, v := range spec.Volumes {
			volumes = append(volumes, v.Name)
			if (v.HostPath == nil) == (v.Secret == nil) {
				t.Errorf("%s: volume %s: expected a hostPath or a secret", name, v.Name)
			}
		}
		used := map[string]bool{}
		for _, c := range slices.Concat(spec.InitContainers, spec.Containers) {
			if c.Image != "margay:dev" {
				t.Errorf("%s: container %s: image %s", name, c.Name, c.Image)
			}
			for _, m := range c.VolumeMounts {
				used[m.Name] = true
				if !slices.Contains(volumes, m.Name) {
					t.Errorf("%s: container %s mounts %s, which there is not", name, c.Name, m.Name)
				}
			}
			for _, e := range c.Env {
				if e.ValueFrom == nil || e.ValueFrom.ConfigMapKeyRef == nil {
					continue
				}
				ref := e.ValueFrom.ConfigMapKeyRef
				if _, there := config.Data[ref.Key]; !there || ref.Name != config.Name {
					t.Errorf("%s: container %s: %s from %s/%s, which there is not", name, c.Name, e.Name, ref.Name, ref.Key)
				}
			}
		}
		for _, v := range volumes {
			if !used[v] {
				t.Errorf("%s: volume %s is not mounted", name, v)
			}
		}
	}
	// A runtime hands each plugin its own part, with the list's name and version.
	var list struct {
		CNIVersion, Name string
		Plugins          []map[string]any
	}
	if err := json.Unmarshal([]byte(config.Data["cni_conflist"]), &list); err != nil || len(list.Plugins) != 1 {
		t.Fatalf("cni_conflist: %v", err)
	}
	plugin := list.Plugins[0]
	plugin["cniVersion"], plugin["name"] = list.CNIVersion, list.Name
	raw, err := json.Marshal(plugin)
	if err != nil {
		t.Fatal(err)
	}
	if conf, err := cni.ParseConf(raw); err != nil || conf.Type != cni.PluginType || conf.Name != "k8s-pod-network" {
		t.Errorf("cni_conflist: %+v, %v", conf, err)
	}
}

// No container is privileged, none gets a capability that it does not name, and no pod holds an API token.
func TestPrivileges(t *testing.T) {
	for name, spec := range podSpecs(t) {
		if spec.AutomountServiceAccountToken == nil || *spec.AutomountServiceAccountToken {
			t.Errorf("%s: an API token is mounted", name)
		}
		for _, c := range slices.Concat(spec.InitContainers, spec.Containers) {
			s := c.SecurityContext
			if s == nil || s.Privileged != nil || s.Capabilities == nil || !slices.Equal(s.Capabilities.Drop, []corev1.Capability{"ALL"}) ||
				s.AllowPrivilegeEscalation == nil || *s.AllowPrivilegeEscalation {
				t.Errorf("%s: container %s: %+v", name, c.Name, s)
			}
		}
	}
	// What docs/operations.md says each daemon needs is what it gets.
	docs, err := os.ReadFile("../../docs/operations.md")
	if err != nil {
		t.Fatal(err)
	}
	capability := regexp.MustCompile(`CAP_([A-Z_]+)`)
	for _, c := range podSpecs(t)["margay-node"].Containers {
		row := regexp.MustCompile("(?m)^\\| `(margay-)?" + c.Name + "` \\|.*$").Find(docs)
		var said, given []string
		for _, m := range capability.FindAllSubmatch(row, -1) {
			said = append(said, string(m[1]))
		}
		for _, add := range c.SecurityContext.Capabilities.Add {
			given = append(given, string(add))
		}
		slices.Sort(said)
		slices.Sort(given)
		if !slices.Equal(said, given) {
			t.Errorf("%s: docs/operations.md says %v, deploy/margay.yaml gives %v", c.Name, said, given)
		}
	}
}

// What the manifests run of margayctl is there, with these flags.
func TestCommands(t *testing.T) {
	specs := podSpecs(t)
	var lines [][]string
	pod := specs["margayctl"].Containers[0]
	lines = append(lines, slices.Concat(pod.Command, pod.Args))
	for _, c := range specs["margay-node"].Containers {
		if c.ReadinessProbe != nil {
			lines = append(lines, c.ReadinessProbe.Exec.Command)
		}
	}
	if len(lines) != 2 {
		t.Fatalf("%q", lines)
	}
	for _, line := range lines {
		cmd, rest, err := ctl.NewCommand().Find(line[1:])
		if err == nil {
			err = cmd.ParseFlags(rest)
		}
		if err == nil {
			err = cmd.ValidateArgs(cmd.Flags().Args())
		}
		if line[0] != "margayctl" || err != nil || !cmd.Runnable() {
			t.Errorf("%q: %v", line, err)
		}
	}
}

// The image holds the binaries that the Makefile builds, from files that there are.
func TestDockerfile(t *testing.T) {
	text, err := os.ReadFile("../../deploy/Dockerfile")
	if err != nil {
		t.Fatal(err)
	}
	makefile, err := os.ReadFile("../../Makefile")
	if err != nil {
		t.Fatal(err)
	}
	mod, err := os.ReadFile("../../go.mod")
	if err != nil {
		t.Fatal(err)
	}
	goVersion := regexp.MustCompile(`(?m)^go (\d+\.\d+)`).FindSubmatch(mod)
	if !bytes.Contains(text, append([]byte("FROM golang:"), goVersion[1]...)) {
		t.Errorf("the image is not built with Go %s", goVersion[1])
	}
	for _, want := range []string{"RUN make build VERSION=${VERSION}\n", "COPY --from=build /src/bin/ /usr/local/bin/\n"} {
		if !bytes.Contains(text, []byte(want)) {
			t.Errorf("expected %q", want)
		}
	}
	for name, spec := range podSpecs(t) {
		for _, c := range spec.Containers {
			binary := c.Command[len(c.Command)-1] // or, of a script, its last word
			binary = binary[strings.LastIndexByte(binary, ' ')+1:]
			if !regexp.MustCompile(`(?m)^BINARIES .*\b` + regexp.QuoteMeta(binary) + `\b`).Match(makefile) {
				t.Errorf("%s: container %s runs %q, which the Makefile does not build", name, c.Name, binary)
			}
		}
	}
	instruction := regexp.MustCompile(`^(FROM|WORKDIR|COPY|RUN|ARG|ENTRYPOINT) \S`)
	for line := range strings.Lines(string(text)) {
		if line = strings.TrimSpace(line); line != "" && !strings.HasPrefix(line, "#") && !instruction.MatchString(line) {
			t.Errorf("not an instruction: %s", line)
		}
	}
}
