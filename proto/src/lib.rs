//! The wire: messages and services generated from `muster/v1/*.proto`, and gRPC's own health check. Nothing else lives
//! here; conversions to and from domain types are in `common::wire`.

/// Package `muster.v1`.
pub mod v1 {
    tonic::include_proto!("muster.v1");
}

/// Package `grpc.health.v1`.
pub mod health {
    tonic::include_proto!("grpc.health.v1");
}
