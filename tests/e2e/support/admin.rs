//! Runs commands that call a running node plugin.

use std::process::{Command, Output};

use serde_json::Value;

use super::{Node, clean_environment, tool};

/// The admin socket of one node plugin.
pub struct Admin {
    endpoint: String,
}

impl Admin {
    /// Starts a node with this configuration and an admin socket.
    #[track_caller]
    pub fn start(configuration: &str) -> (Node, Self) {
        let mut endpoint = String::new();
        let node = Node::start_with(|sandbox, options| {
            endpoint = format!("unix://{}", sandbox.path().join("admin.sock").display());
            options.configuration(configuration).argument(&format!("--admin-endpoint={endpoint}"))
        });
        (node, Self { endpoint })
    }

    /// Uses a socket of the test's own.
    pub fn at(endpoint: &str) -> Self {
        Self { endpoint: endpoint.to_owned() }
    }

    pub fn command(&self, arguments: &[&str]) -> Command {
        let mut command: Command = tool(env!("CARGO_BIN_EXE_csi-driver-oci"));
        clean_environment(&mut command);
        command.args(arguments).arg("--admin-endpoint").arg(&self.endpoint);
        command
    }

    pub fn ask(&self, arguments: &[&str]) -> Output {
        self.command(arguments).output().expect("the binary")
    }

    /// Returns the command's text output.
    #[track_caller]
    pub fn text(&self, arguments: &[&str]) -> String {
        let output = self.ask(arguments);
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).expect("text")
    }

    /// Returns the command's JSON output.
    #[track_caller]
    pub fn json(&self, arguments: &[&str]) -> Value {
        let told = self.text(&[arguments, &["--output", "json"]].concat());
        serde_json::from_str(&told).expect("JSON")
    }

    /// Returns the one line of a command that fails.
    #[track_caller]
    pub fn refused(&self, arguments: &[&str]) -> String {
        let output = self.ask(arguments);
        let told = String::from_utf8(output.stderr).expect("text");
        assert_eq!(output.status.code(), Some(1), "{told}");
        assert_eq!(told.lines().count(), 1, "{told}");
        told
    }

    /// Returns whether the cache has an artifact of this reference.
    #[track_caller]
    pub fn holds(&self, reference: &str) -> bool {
        let list = self.json(&["ls"]);
        let artifacts = list["artifacts"].as_array().expect("a list");
        artifacts.iter().any(|artifact| {
            artifact["damaged"] == false
                && artifact["references"].as_array().expect("a list").contains(&reference.into())
        })
    }
}
