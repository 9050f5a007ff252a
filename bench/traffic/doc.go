// Package traffic is the generator and the sink of the benchmarks. The generator sends prepared UDP packets by batches on
// an AF_XDP socket (where there is none, AF_PACKET), as fast as it can or at a rate. The sink takes whatever arrives out of an AF_PACKET ring, looks
// into IP-in-IP and VXLAN, and counts only what is whole, with the inner IP and UDP checksums verified.
//
// Each runs as a process of its own, so that its CPU time can be told from the router's; Board is the page of memory by
// which it is steered and read while it runs.
package traffic
