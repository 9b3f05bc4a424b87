//! Compiles the schema of the control stream with protox, so that no `protoc` is needed on the machine.

use std::error::Error;

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo:rerun-if-changed=vmferry");
    println!("cargo:rerun-if-changed=build.rs");
    let schema = protox::compile(["vmferry/v1/control.proto"], ["."])?;
    prost_build::Config::new().compile_fds(schema)?;
    Ok(())
}
