//! Tests `docs/tutorial.md`: its commands run with `kubectl`, a registry, the controller and two node plugins.
//!
//! `tests/cluster/tutorial.py` plays the rest of the cluster. This test plays the kubelets and Argo CD.

use std::{
    collections::HashMap,
    fs,
    io::{BufRead as _, BufReader, Read as _, Write as _},
    net::TcpStream,
    path::Path,
    process::{Child, Command, Stdio},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use serde_json::{Value, json};

use crate::{
    cluster::python,
    documents::{Step, fits, make_program, make_programs, run_path, steps},
    support::{
        Gate, Kubelet, Pod, Proxy, Volume, clean_environment, own_registry,
        preload_cluster::Cluster, run, tool,
    },
};

const NODES: [&str; 2] = ["one", "two"];
/// The maximum time until a repeated command prints what the page shows.
const PATIENCE: Duration = Duration::from_mins(1);

/// The rest of the cluster, in a process of its own.
struct Played {
    process: Child,
    port: u16,
}

impl Played {
    fn start(api: &str) -> Self {
        let mut command = python("tutorial.py");
        let mut process = command
            .args(["serve", api])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .expect("python");
        let mut line = String::new();
        let output = process.stdout.take().expect("its output");
        BufReader::new(output).read_line(&mut line).expect("a line");
        let port = line.trim().parse().expect("a port");
        Self { process, port }
    }
}

impl Drop for Played {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// Sends a request. Returns the body of the response.
fn ask(port: u16, method: &str, path: &str) -> std::io::Result<String> {
    let mut stream = TcpStream::connect(("127.0.0.1", port))?;
    write!(
        stream,
        "{method} {path} HTTP/1.1\r\nHost: test\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
    )?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    Ok(answer.split_once("\r\n\r\n").map(|(_, body)| body.to_owned()).unwrap_or_default())
}

/// Publishes and unpublishes the volumes of pods on their nodes until the test ends, like the kubelets.
fn play_kubelets(kubelets: &[Kubelet], port: u16, ends: &AtomicBool) {
    let mut mounted: HashMap<String, (usize, Volume)> = HashMap::new();
    while !ends.load(Ordering::Relaxed) {
        let pods = ask(port, "GET", "/play/pods").unwrap_or_default();
        let pods: HashMap<String, Value> = serde_json::from_str(&pods).unwrap_or_default();
        let uid = |pod: &Value| pod["uid"].as_str().unwrap_or_default().to_owned();
        let wanted: Vec<_> = pods.values().map(uid).collect();
        mounted.retain(|uid, (node, volume)| {
            let stays = wanted.contains(uid);
            if !stays {
                kubelets[*node].unpublish(volume);
            }
            stays
        });
        for (name, pod) in &pods {
            if mounted.contains_key(&uid(pod)) {
                continue;
            }
            let node = NODES.iter().position(|node| pod["node"] == *node).expect("a node");
            let namespace = pod["namespace"].as_str().expect("a namespace").to_owned();
            let played = Pod { name: name.clone(), namespace, uid: uid(pod) };
            let mut volume = kubelets[node].inline(&played, "artifact", "");
            volume.request.volume_context.remove("reference");
            volume.request.readonly = true;
            for (key, value) in pod["attributes"].as_object().expect("attributes") {
                volume = volume.attribute(key, value.as_str().expect("text"));
            }
            if kubelets[node].publish(&volume).is_ok() {
                mounted.insert(uid(pod), (node, volume));
                ask(port, "POST", &format!("/play/ready/{name}")).expect("an answer");
            }
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    for (node, volume) in mounted.into_values() {
        kubelets[node].unpublish(&volume);
    }
}

/// Ends the kubelets, also if the test fails early.
struct StopKubelets<'a>(&'a AtomicBool);

impl Drop for StopKubelets<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// A reader with a cluster.
struct Reader {
    cluster: Cluster,
    proxy: Proxy,
    blobs: Option<Arc<Gate>>,
    path: String,
}

impl Reader {
    /// Prepares the folder of the reader: sources, a Git repository that Argo CD follows, and programs.
    fn prepare(&self, port: u16) {
        let sandbox = &self.cluster.sandbox;
        let folder = sandbox.folder("reader");
        let root = Path::new(env!("CARGO_MANIFEST_DIR"));
        for name in ["deploy", "charts", "examples"] {
            std::os::unix::fs::symlink(root.join(name), folder.join(name)).expect("a link");
        }
        for name in ["prometheus", "promtool"] {
            let source = folder.join("prometheus/cmd").join(name);
            fs::create_dir_all(&source).expect("a folder");
            fs::write(source.join("main.go"), "package main\n").expect("a source");
        }
        let server = json!({"server": format!("http://127.0.0.1:{port}")});
        let kubeconfig = json!({
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "test",
            "clusters": [{"name": "test", "cluster": server}],
            "users": [{"name": "test", "user": {}}],
            "contexts": [{"name": "test", "context": {"cluster": "test", "user": "test"}}],
        });
        fs::write(sandbox.path().join("reader.kubeconfig"), kubeconfig.to_string())
            .expect("a file");

        let programs = sandbox.folder("programs");
        make_programs(&programs);
        // The API server has no OpenAPI, and reads JSON only.
        let kubectl = format!(
            "#!/bin/sh\nPATH='{}'\ncase \"$1 $2\" in\n  'create namespace') kubectl \"$@\" --dry-run=client -o yaml | \
             kubectl apply --validate=false -f - ;;\n  apply*) exec kubectl \"$@\" --validate=false ;;\n  *) exec \
             kubectl \"$@\" ;;\nesac\n",
            run_path()
        );
        make_program(&programs, "kubectl", &kubectl);
        let script = python("tutorial.py");
        let words: Vec<_> = std::iter::once(script.get_program())
            .chain(script.get_args())
            .map(|word| word.to_string_lossy().into_owned())
            .collect();
        for name in ["helm", "go"] {
            let line = format!("#!/bin/sh\nexec {} {name} \"$@\"\n", words.join(" "));
            make_program(&programs, name, &line);
        }

        let fleet = sandbox.path().join("fleet.git");
        run(tool("git").args(["init", "--quiet", "--bare", "--initial-branch=main"]).arg(&fleet));
        let hook = "#!/bin/sh\nset -eu\nfolder=\"$(mktemp -d)\"\ngit archive main | tar -x -C \"$folder\"\n\
                    kubectl apply -f \"$folder/prometheus\"\nrm -rf \"$folder\"\n";
        make_program(&fleet.join("hooks"), "post-receive", hook);
        let settings = format!(
            "[url \"{}\"]\n  insteadOf = https://git.example.com/platform/fleet.git\n[user]\n  name = Test\n  email = \
             test@example.com\n[init]\n  defaultBranch = main\n",
            fleet.display()
        );
        fs::write(folder.join(".gitconfig"), settings).expect("the settings");
    }

    fn shell(&self, command: &str) -> Command {
        let sandbox = &self.cluster.sandbox;
        let reader = sandbox.path().join("reader");
        let mut shell = tool("bash");
        clean_environment(&mut shell);
        shell
            .args(["-euo", "pipefail", "-c", command])
            .current_dir(&reader)
            .env("PATH", &self.path)
            .env("HOME", &reader)
            .env("KUBECONFIG", sandbox.path().join("reader.kubeconfig"))
            .env("ORAS_FLAGS", "--plain-http")
            .env("PYTHONDONTWRITEBYTECODE", "1")
            .env("STATE_DIR", sandbox.path().join("cli"))
            .env_remove("DOCKER_CONFIG");
        shell
    }

    /// Runs a command. One that reads is repeated until it prints what is shown.
    #[track_caller]
    fn follow(&self, step: &Step) {
        let host = self.proxy.host();
        let typed = step.command.replace("registry.example.com", &host);
        let reads = typed.starts_with("kubectl") && typed.contains(" get ");
        let started = Instant::now();
        loop {
            let output = self.shell(&typed).output().expect("a shell");
            let out = String::from_utf8_lossy(&output.stdout).into_owned();
            let missing =
                step.expected.iter().filter(|line| !line.trim().is_empty()).find(|shown| {
                    let shown = shown.replace("registry.example.com", &host);
                    !out.lines().any(|line| fits(line, &shown))
                });
            if output.status.success() && missing.is_none() {
                return;
            }
            assert!(
                reads && started.elapsed() < PATIENCE,
                "{}\n{}\nnot shown: {missing:?}\n{out}{}",
                step.command,
                output.status,
                String::from_utf8_lossy(&output.stderr)
            );
            std::thread::sleep(Duration::from_millis(100));
        }
    }

    /// Carries out what the page tells its test in a comment.
    #[track_caller]
    fn act(&mut self, direction: &str) {
        match direction {
            "slow registry" => self.blobs = Some(self.proxy.hold_blobs()),
            "fast registry" => self.blobs.take().expect("a slow registry").open(),
            "registry down" => self.proxy.go_down(),
            "registry up" => self.proxy.come_back(),
            other => panic!("the tutorial tells its test {other:?}, which is not known"),
        }
    }
}

#[test]
fn the_tutorial_works_from_ci_to_a_rollback() {
    let registry = own_registry();
    let proxy = Proxy::new(&registry);
    let mut cluster = Cluster::before(&registry, &NODES);
    let _controller = cluster.controller();
    for node in NODES {
        cluster.start_node(node);
    }
    let played = Played::start(&cluster.api.listen().to_string());
    let kubelets: Vec<_> = cluster.drivers.iter().map(|driver| driver.kubelet().clone()).collect();
    let path = format!("{}:{}", cluster.sandbox.path().join("programs").display(), run_path());
    let mut reader = Reader { cluster, proxy, blobs: None, path };
    reader.prepare(played.port);

    let page = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/tutorial.md");
    let page = fs::read_to_string(page).expect("the page");
    let ends = AtomicBool::new(false);
    let mut commands = 0;
    std::thread::scope(|scope| {
        scope.spawn(|| play_kubelets(&kubelets, played.port, &ends));
        let _stop = StopKubelets(&ends);
        for (number, part) in page.split("<!-- test: ").enumerate() {
            let text = if number == 0 {
                part
            } else {
                let (direction, text) = part.split_once(" -->").expect("the end of a comment");
                reader.act(direction);
                text
            };
            for step in steps(text) {
                eprintln!("$ {}", step.command);
                reader.follow(&step);
                commands += 1;
            }
        }
    });
    assert!(commands > 40, "only {commands} commands were run");
}
