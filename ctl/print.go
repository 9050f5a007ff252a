package ctl

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"reflect"
	"slices"
	"strings"
	"text/tabwriter"
	"text/template"
	"unicode"

	"sigs.k8s.io/yaml"

	"margay/datastore"
)

// found is one answer of get: a resource that was asked for by name, or the list of a kind.
type found struct {
	kind    *datastore.Kind
	objs    []datastore.Object
	list    bool
	version int64 // of a list: the datastore's revision
}

// printer writes answers in one of the output formats.
type printer struct {
	format    string   // ps, wide, yaml, json, name, custom-columns, go-template
	columns   []string // custom-columns
	template  *template.Template
	namespace bool   // tables of namespaced kinds begin with it
	export    bool   // leave out what belongs to this cluster
	asNumber  string // the cluster's
}

// newPrinter understands -o.
func newPrinter(output string) (*printer, error) {
	key, value, _ := strings.Cut(output, "=")
	switch key {
	case "ps", "wide", "yaml", "json", "name":
		if key == output {
			return &printer{format: key}, nil
		}
	case "yml":
		return &printer{format: "yaml"}, nil
	case "custom-columns":
		if value == "" {
			return nil, errors.New("need to specify at least one column")
		}
		return &printer{format: key, columns: strings.Split(value, ",")}, nil
	case "go-template", "go-template-file":
		if value == "" {
			return nil, fmt.Errorf("need to specify a template%s", strings.ReplaceAll(strings.TrimPrefix(key, "go-template"), "-", " "))
		}
		if key == "go-template-file" {
			raw, err := os.ReadFile(value)
			if err != nil {
				return nil, err
			}
			value = string(raw)
		}
		p := &printer{format: "go-template"}
		var err error
		p.template, err = template.New("get").Funcs(template.FuncMap{
			"join":            func(items any, separator string) string { return joinAndTruncate(items, separator, 0) },
			"joinAndTruncate": joinAndTruncate,
			"config":          p.config,
		}).Parse(value)
		return p, err
	}
	return nil, fmt.Errorf("unrecognized output format '%s': expected ps, wide, yaml, json, name, go-template=…, go-template-file=… or custom-columns=…", output)
}

// config is what templates can ask about the cluster: its AS number.
func (p *printer) config(name string) (string, error) {
	if !strings.EqualFold(name, "asnumber") {
		return "", fmt.Errorf("config %q: expected asnumber", name)
	}
	return p.asNumber, nil
}

func (p *printer) print(w io.Writer, answers []found) error {
	switch p.format {
	case "name":
		for _, a := range answers {
			for _, o := range a.objs {
				fmt.Fprintf(w, "%s/%s\n", strings.ToLower(a.kind.Kind), o.Head().Metadata.Name)
			}
		}
		return nil
	case "yaml", "json":
		return p.printDocuments(w, answers)
	case "go-template":
		return p.printTemplate(w, answers)
	}
	for _, a := range answers {
		if err := p.printTable(w, a); err != nil {
			return err
		}
	}
	return nil
}

// jsonList is the list of a kind, with calicoctl's order of fields.
type jsonList struct {
	Kind       string `json:"kind"`
	APIVersion string `json:"apiVersion"`
	Metadata   struct {
		ResourceVersion string `json:"resourceVersion"`
	} `json:"metadata"`
	Items []json.RawMessage `json:"items"`
}

// printDocuments prints what is stored, unknown fields included, in a form that apply takes back.
func (p *printer) printDocuments(w io.Writer, answers []found) error {
	var docs []any
	for _, a := range answers {
		items := []json.RawMessage{}
		for _, o := range a.objs {
			doc, err := datastore.Document(o)
			if err != nil {
				return err
			}
			if meta, ok := doc["metadata"].(map[string]any); ok && p.export && !a.list {
				for _, key := range []string{"namespace", "uid", "resourceVersion", "creationTimestamp"} {
					delete(meta, key)
				}
				meta["creationTimestamp"] = nil // as calicoctl shows it
			}
			raw, err := datastore.OrderedJSON(o, doc)
			if err != nil {
				return err
			}
			items = append(items, raw)
		}
		if a.list {
			list := jsonList{Kind: a.kind.Kind + "List", APIVersion: datastore.APIVersion, Items: items}
			list.Metadata.ResourceVersion = fmt.Sprint(a.version)
			docs = append(docs, list)
			continue
		}
		for _, item := range items {
			docs = append(docs, item)
		}
	}
	var v any = docs
	if len(docs) == 1 {
		v = docs[0]
	}
	return printDocument(w, p.format, v)
}

// printDocument prints v as YAML or JSON.
func printDocument(w io.Writer, format string, v any) error {
	if format == "json" {
		return printJSON(w, v)
	}
	out, err := yaml.Marshal(v)
	if err != nil {
		return err
	}
	_, err = w.Write(out)
	return err
}

func (p *printer) printTable(w io.Writer, a found) error {
	columns, err := columnsOf(a.kind, p.columns, p.format == "wide", p.namespace && p.format != "custom-columns")
	if err != nil {
		return err
	}
	tw := tabwriter.NewWriter(w, 5, 1, 3, ' ', 0)
	for _, c := range columns {
		fmt.Fprint(tw, c.head, "\t")
	}
	fmt.Fprintln(tw)
	for _, o := range a.objs {
		doc, err := datastore.Document(o)
		if err != nil {
			return err
		}
		doc[clusterASNumber] = p.asNumber
		for _, c := range columns {
			// A tab or a line break in a value would break the table.
			fmt.Fprint(tw, strings.Map(oneLine, c.cell(doc)), "\t")
		}
		fmt.Fprintln(tw)
	}
	if err := tw.Flush(); err != nil {
		return err
	}
	_, err = fmt.Fprintln(w) // calicoctl leaves a gap after each table
	return err
}

func oneLine(r rune) rune {
	if unicode.IsControl(r) {
		return ' '
	}
	return r
}

// printTemplate gives a template what calicoctl gives it: a list of resources and of lists with .Items, whose fields
// have their Go names.
func (p *printer) printTemplate(w io.Writer, answers []found) error {
	var data []any
	for _, a := range answers {
		var items []any
		for _, o := range a.objs {
			view, err := templateView(o)
			if err != nil {
				return err
			}
			items = append(items, view)
		}
		if a.list {
			data = append(data, map[string]any{"Kind": a.kind.Kind + "List", "APIVersion": datastore.APIVersion, "Items": items})
		} else {
			data = append(data, items...)
		}
	}
	var out bytes.Buffer
	if err := p.template.Execute(&out, data); err != nil {
		return err
	}
	_, err := w.Write(bytes.ReplaceAll(out.Bytes(), []byte("<no value>"), nil))
	return err
}

// templateView is an object as templates see it. The kinds with types of their own are shown as they are; the others get
// Go names beside those of JSON, as far as Calico forms them by rule.
func templateView(o datastore.Object) (any, error) {
	if _, generic := o.(*datastore.Resource); !generic {
		return o, nil
	}
	doc, err := datastore.Document(o)
	if err != nil {
		return nil, err
	}
	view := goNames(doc).(map[string]any)
	view["ObjectMeta"] = view["Metadata"]
	return view, nil
}

// initialisms are the words that Go writes in capitals.
var initialisms = map[string]string{"ip": "IP", "ipv4": "IPv4", "ipv6": "IPv6", "ipip": "IPIP", "mac": "MAC", "bgp": "BGP", "bpf": "BPF",
	"vxlan": "VXLAN", "mtu": "MTU", "nat": "NAT", "cidr": "CIDR", "uid": "UID", "as": "AS", "http": "HTTP", "icmp": "ICMP", "xdp": "XDP", "api": "API"}

func goNames(value any) any {
	switch v := value.(type) {
	case []any:
		out := make([]any, len(v))
		for i := range v {
			out[i] = goNames(v[i])
		}
		return out
	case map[string]any:
		out := map[string]any{}
		for key, inner := range v {
			if !slices.Contains([]string{"labels", "annotations", "labelsToApply", "matchLabels"}, key) {
				inner = goNames(inner)
			}
			out[key], out[goName(key)] = inner, inner
		}
		return out
	}
	return value
}

func goName(key string) string {
	end := strings.IndexFunc(key, unicode.IsUpper)
	if end < 0 {
		end = len(key)
	}
	if word, ok := initialisms[key[:end]]; ok {
		return word + key[end:]
	}
	if key == "" {
		return key
	}
	return strings.ToUpper(key[:1]) + key[1:]
}

// joinAndTruncate joins the elements of a list, or a map's as k=v, and cuts the text off at limit, where it is not 0.
func joinAndTruncate(items any, separator string, limit int) string {
	if items == nil {
		return ""
	}
	var words []string
	switch v := reflect.ValueOf(items); v.Kind() {
	case reflect.Slice:
		for i := range v.Len() {
			words = append(words, plain(v.Index(i).Interface()))
		}
	case reflect.Map:
		for _, key := range v.MapKeys() {
			words = append(words, plain(key.Interface())+"="+plain(v.MapIndex(key).Interface()))
		}
		slices.Sort(words)
	default:
		words = []string{plain(items)}
	}
	text := strings.Join(words, separator)
	if limit > 3 && len(text) > limit {
		text = text[:limit-3] + "..."
	}
	return text
}
