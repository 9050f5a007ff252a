package ctl

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"margay/datastore"
)

// input is where a command's resources come from: calicoctl's flags.
type input struct {
	files     []string
	recursive bool
	skipEmpty bool
	namespace string
}

// addInput gives cmd the flags that say which resources it is about.
func addInput(cmd *cobra.Command, in *input) {
	addFiles(cmd, in)
	addNamespace(cmd, &in.namespace)
}

// addFiles is addInput for resources that have no namespace.
func addFiles(cmd *cobra.Command, in *input) {
	f := cmd.Flags()
	f.StringArrayVarP(&in.files, "filename", "f", nil, "a file, or a directory of .yaml, .yml and .json files; - for standard input")
	f.BoolVarP(&in.recursive, "recursive", "R", false, "go through the directories under the one of -f, too")
	f.BoolVar(&in.skipEmpty, "skip-empty", false, "files without a resource are no error")
}

func addNamespace(cmd *cobra.Command, namespace *string) {
	cmd.Flags().StringVarP(namespace, "namespace", "n", "", "the namespace of namespaced resources (default \"default\")")
}

// errNothing says that there is nothing to do, and that this is in order.
var errNothing = errors.New("no resources specified")

// invalid is an error about the input as a whole: nothing was done.
type invalid struct{ err error }

func (e invalid) Error() string { return "failed to execute command: " + e.err.Error() }

func (e invalid) Unwrap() error { return e.err }

// read reads all manifests. Nothing is returned if anything in any of them is wrong.
func (in *input) read(cmd *cobra.Command, storedFields bool) ([]datastore.Object, error) {
	opts := datastore.ManifestOptions{Namespace: in.namespace, StoredFields: storedFields}
	return in.each(func(file string) ([]datastore.Object, error) { return readFile(cmd, file, opts) })
}

// each gives what reading of all files makes of them, all or nothing.
func (in *input) each(read func(file string) ([]datastore.Object, error)) ([]datastore.Object, error) {
	var (
		objs []datastore.Object
		errs []error
	)
	for _, name := range in.files {
		files, err := in.walk(name)
		if err != nil {
			return nil, invalid{err}
		}
		before := len(objs)
		for _, file := range files {
			got, err := read(file)
			if errors.Is(err, datastore.ErrNoResources) {
				if in.skipEmpty {
					continue
				}
				return nil, fmt.Errorf("no resources specified in file %s", file)
			}
			if err != nil {
				errs = append(errs, fmt.Errorf("%s: %w", file, err))
			}
			objs = append(objs, got...)
		}
		if len(objs) == before && len(errs) == 0 && !in.skipEmpty {
			return nil, fmt.Errorf("no resources specified in directory %s", name)
		}
	}
	if err := errors.Join(errs...); err != nil {
		return nil, invalid{err}
	}
	if len(objs) == 0 {
		return nil, errNothing
	}
	return objs, nil
}

// readInput reads what -f names: a file, or standard input for "-".
func readInput(cmd *cobra.Command, file string) ([]byte, error) {
	if file == "-" {
		return io.ReadAll(cmd.InOrStdin())
	}
	return os.ReadFile(file)
}

func readFile(cmd *cobra.Command, file string, opts datastore.ManifestOptions) ([]datastore.Object, error) {
	data, err := readInput(cmd, file)
	if err != nil {
		return nil, err
	}
	return datastore.DecodeManifestFor(data, opts)
}

// walk gives the files that a name of -f stands for, sorted.
func (in *input) walk(name string) ([]string, error) {
	if name == "-" {
		return []string{name}, nil
	}
	if info, err := os.Stat(name); err != nil || !info.IsDir() {
		return []string{name}, err
	}
	var files []string
	err := filepath.WalkDir(name, func(path string, entry fs.DirEntry, err error) error {
		switch {
		case err != nil:
			return err
		case entry.IsDir():
			if path != name && !in.recursive {
				return fs.SkipDir
			}
		case slices.Contains([]string{".yaml", ".yml", ".json"}, strings.ToLower(filepath.Ext(path))):
			files = append(files, path)
		}
		return nil
	})
	return files, err
}

// path is the name of a resource as the datastore takes it: with the namespace where the kind has one.
func path(kind *datastore.Kind, namespace, name string) (string, error) {
	switch {
	case name == "":
		return "", errors.New("resource name may not be empty")
	case !kind.Namespaced && namespace != "":
		return "", fmt.Errorf("%s is not namespaced", kind.Kind)
	case !kind.Namespaced:
		return name, nil
	case namespace == "":
		namespace = "default"
	}
	return namespace + "/" + name, nil
}

// calicosWords words what happened to a resource as calicoctl does.
func calicosWords(err error) error {
	var re *datastore.ResourceError
	if !errors.As(err, &re) {
		return err
	}
	id := fmt.Sprintf("%s(%s)", re.Kind, re.Name)
	switch {
	case errors.Is(err, datastore.ErrNotFound):
		return fmt.Errorf("resource does not exist: %s with error: %w", id, re.Err)
	case errors.Is(err, datastore.ErrExists):
		return said{fmt.Sprintf("resource already exists: %s", id), err}
	case errors.As(err, new(datastore.UnsupportedError)):
		return re.Err
	case errors.Is(err, datastore.ErrConflict):
		return said{fmt.Sprintf("update conflict: %s: %v", id, re.Err), err}
	}
	return err
}

// said is an error in calicoctl's words.
type said struct {
	text string
	err  error
}

func (e said) Error() string { return e.text }

func (e said) Unwrap() error { return e.err }
