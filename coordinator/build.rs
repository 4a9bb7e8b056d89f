//! Tells the program which commit it is built from.

#[path = "../common/build/commit.rs"]
mod commit;

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-changed=../common/build/commit.rs");
    commit::tell(&["src", "../common/src", "../worker/src", "../proto"]);
}
