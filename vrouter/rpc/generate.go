package rpc

//go:generate protoc -I vrouterpb --go_out=vrouterpb --go_opt=paths=source_relative --go-grpc_out=vrouterpb --go-grpc_opt=paths=source_relative vrouterpb/vrouter.proto
