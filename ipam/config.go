package ipam

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"margay/datastore"
)

// configResource is the IPAMConfiguration as a resource: what counts where Calico's own key is not there.
const configResource = "/calico/resources/v3/projectcalico.org/ipamconfigurations/default"

// Config is the cluster's IPAM configuration.
type Config struct {
	StrictAffinity     bool // no node takes addresses out of another's block
	AutoAllocateBlocks bool // nodes claim blocks as they need them
	MaxBlocksPerHost   int  // 0: no limit
	CooldownSeconds    int  // how long a released address is not given out again

	extra map[string]json.RawMessage
}

type wireConfig struct {
	StrictAffinity     bool `json:"strict_affinity"`
	AutoAllocateBlocks bool `json:"auto_allocate_blocks"`
	MaxBlocksPerHost   int  `json:"maxBlocksPerHost"`
	CooldownSeconds    int  `json:"ipCooldownSeconds,omitempty"`
}

func (c Config) cooldown() time.Duration { return time.Duration(c.CooldownSeconds) * time.Second }

// Validate refuses what would leave a node without any way to an address, and a limit that borrowing would get around.
func (c Config) Validate() error {
	switch {
	case c.MaxBlocksPerHost < 0:
		return fmt.Errorf("maxBlocksPerHost %d: expected 0 (no limit) or more", c.MaxBlocksPerHost)
	case c.CooldownSeconds < 0:
		return fmt.Errorf("ipCooldownSeconds %d: expected 0 or more", c.CooldownSeconds)
	case !c.StrictAffinity && !c.AutoAllocateBlocks:
		return errors.New("strictAffinity and autoAllocateBlocks: expected at least one of them to be true")
	case c.MaxBlocksPerHost > 0 && !c.StrictAffinity:
		return errors.New("maxBlocksPerHost: expected strictAffinity to be true where it is set")
	}
	return nil
}

// decodeConfig reads the configuration from Calico's key or else from the resource; without either, blocks are claimed
// and addresses borrowed as needed. In Calico's key what is absent is false, as Calico leaves out what is false.
func decodeConfig(key, resource []datastore.KV) (Config, error) {
	c := Config{AutoAllocateBlocks: true}
	fail := func(kv datastore.KV, err error) (Config, error) {
		return c, fmt.Errorf("%s: expected the IPAM configuration: %w", kv.Key, err)
	}
	if len(key) > 0 {
		var w wireConfig
		if err := json.Unmarshal(key[0].Value, &w); err != nil {
			return fail(key[0], datastore.JSONError(err))
		}
		extra, err := unknown(key[0].Value, "strict_affinity", "auto_allocate_blocks", "maxBlocksPerHost", "ipCooldownSeconds")
		if err != nil {
			return fail(key[0], err)
		}
		return Config{w.StrictAffinity, w.AutoAllocateBlocks, w.MaxBlocksPerHost, w.CooldownSeconds, extra}, nil
	}
	if len(resource) == 0 {
		return c, nil
	}
	var r struct {
		Spec struct {
			StrictAffinity     bool  `json:"strictAffinity"`
			AutoAllocateBlocks *bool `json:"autoAllocateBlocks"`
			MaxBlocksPerHost   int   `json:"maxBlocksPerHost"`
			CooldownSeconds    int   `json:"ipCooldownSeconds"`
		} `json:"spec"`
	}
	if err := json.Unmarshal(resource[0].Value, &r); err != nil {
		return fail(resource[0], datastore.JSONError(err))
	}
	c.StrictAffinity, c.MaxBlocksPerHost, c.CooldownSeconds = r.Spec.StrictAffinity, r.Spec.MaxBlocksPerHost, r.Spec.CooldownSeconds
	if r.Spec.AutoAllocateBlocks != nil {
		c.AutoAllocateBlocks = *r.Spec.AutoAllocateBlocks
	}
	return c, nil
}

// ReadConfig reads the cluster's IPAM configuration; the defaults where nothing is stored.
func ReadConfig(ctx context.Context, s *datastore.Store) (Config, error) {
	lists, _, err := s.ListMany(ctx, configKey, configResource)
	if err != nil {
		return Config{}, err
	}
	return decodeConfig(lists[0], lists[1])
}

// ChangeConfig reads the configuration, lets change alter it, checks it and stores it under Calico's key, again from the
// start when somebody else was faster, within bounds.
func ChangeConfig(ctx context.Context, s *datastore.Store, change func(*Config)) error {
	for try := range tries {
		lists, _, err := s.ListMany(ctx, configKey, configResource)
		if err != nil {
			return err
		}
		c, err := decodeConfig(lists[0], lists[1])
		if err != nil {
			return err
		}
		change(&c)
		if err := c.Validate(); err != nil {
			return err
		}
		value, err := withUnknown(wireConfig{c.StrictAffinity, c.AutoAllocateBlocks, c.MaxBlocksPerHost, c.CooldownSeconds}, c.extra)
		if err != nil {
			return err
		}
		op := datastore.OpCreate(configKey, value)
		if len(lists[0]) > 0 {
			op = datastore.OpUpdate(configKey, value, lists[0][0].Revision)
		}
		if _, err := s.Txn(ctx, op); !contended(err) {
			return err
		}
		if err := datastore.Backoff(ctx, try); err != nil {
			return err
		}
	}
	return fmt.Errorf("%s: %w", configKey, datastore.ErrConflict)
}
