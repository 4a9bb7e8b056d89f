//! Domain types to protobuf and back: the only place where the two meet.
