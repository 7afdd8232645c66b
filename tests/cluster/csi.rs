//! The conformance suite of CSI against the socket that the kubelet calls.

use crate::support::{Artifact, Pod, TestNamespace, on_node};

#[test]
fn csi_sanity_passes() {
    let namespace = TestNamespace::new("sanity");
    let artifact = Artifact::push("tests/sanity", &[("file", "sane\n")]);
    let plugin = "/var/lib/kubelet/plugins/oci.custom.io/csi.sock";
    // The socket must be below the directory of pods, the part of the node that the driver sees, and in that of an
    // existing pod: the kubelet removes others.
    let pod = Pod::holding("holder", &artifact.reference()).on("node-1");
    namespace.run(&pod);
    namespace.wait_for_phase("holder", "Running");
    let uid = namespace.field("pod", "holder", "{.metadata.uid}");
    let script = format!(
        r#"
mkdir -p /var/lib/kubelet/pods/{uid}/sanity
cd /var/lib/kubelet/pods/{uid}/sanity
echo 'reference: "{}"' > parameters.yaml
csi-test-controller /run/csi-test.sock >/dev/null 2>&1 </dev/null &
controller=$!
trap 'kill $controller; rm -rf "$PWD" /run/csi-test.sock' EXIT
csi-sanity --csi.endpoint=unix://{plugin} --csi.controllerendpoint=unix:///run/csi-test.sock \
    --csi.mountdir="$PWD/mount" --csi.stagingdir="$PWD/staging" \
    --csi.testvolumeparameters="$PWD/parameters.yaml" --ginkgo.no-color --ginkgo.skip='\[Controller Server\]'
"#,
        artifact.reference()
    );
    let said =
        on_node("node-1", &["sh", "-euc", &script]).unwrap_or_else(|error| panic!("{error}"));
    let summary = said.lines().find(|line| line.starts_with("Ran ")).unwrap_or_default();
    eprintln!("{summary}");
    assert!(said.contains("SUCCESS!") && said.contains("15 Passed | 0 Failed"), "{said}");
}
