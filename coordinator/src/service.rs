//! gRPC: messages become events, commands become messages.
