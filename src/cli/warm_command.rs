//! `warm`: fetches artifacts before a pod needs them.

use std::collections::HashMap;
use std::io::IsTerminal as _;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use clap::Args;
use indicatif::{MultiProgress, ProgressBar, ProgressStyle};

use super::admin_call::{AdminCallArguments, ended_early, platform_text, unless_interrupted};
use super::client_credentials::{docker_config, for_person};
use super::output::{OutputArguments, print, print_error};
use super::{CommandError, text_table};
use crate::proto::admin::warm_event::State;
use crate::proto::admin::{WarmEvent, WarmRequest};
use oci::{Platform, Reference};
use text::human_units::Bytes;

/// The interval of lines with the progress of an artifact, without a terminal.
const LINE_INTERVAL: Duration = Duration::from_secs(10);

/// Arguments of `warm`.
#[derive(Debug, Args)]
#[command(after_help = "Ctrl-C ends the command, not the node's work: it goes on.

Examples:
  csi-driver-oci warm registry.example.com/app:v2 --pin
  csi-driver-oci warm --file references.txt
  csi-driver-oci warm --docker-config ~/.docker/config.json registry.example.com/private/app:v2")]
pub(super) struct WarmArguments {
    /// The references to fetch.
    #[arg(required_unless_present = "file")]
    references: Vec<Reference>,
    /// A file with one reference a line. Empty lines and comments after # are ignored.
    #[arg(long, value_name = "LIST")]
    file: Option<PathBuf>,
    /// Pin each artifact on this node until `unpin`.
    #[arg(long)]
    pin: bool,
    /// The docker config.json with credentials [default: the files of docker and podman].
    #[arg(long, value_name = "FILE")]
    docker_config: Option<PathBuf>,
    /// The platform to choose from an index, such as `linux/arm64` [default: the node's].
    #[arg(long)]
    platform: Option<Platform>,
    #[command(flatten)]
    admin: AdminCallArguments,
}

pub(super) fn run(mut arguments: WarmArguments) -> Result<(), CommandError> {
    let wrong = arguments.read_list()?;
    let references = &arguments.references;
    let docker_config = docker_config(arguments.docker_config.as_deref(), references)?;
    let count = references.len() + wrong.len();
    let request = WarmRequest {
        references: references.iter().map(Reference::to_string).collect(),
        platform: platform_text(arguments.platform.as_ref()),
        pin: arguments.pin,
        docker_config,
    };
    let output = &arguments.admin.output;
    let mut display = ProgressDisplay::new(output);
    for line in &wrong {
        display.show(line);
    }
    let ended = arguments.admin.call(async |mut client| {
        unless_interrupted(async {
            let request_count = request.references.len();
            if request_count == 0 {
                return Ok(Vec::new());
            }
            let mut events = client.warm(request).await?.into_inner();
            let mut ended = Vec::new();
            while let Some(mut event) = events.message().await? {
                if let Ok(reference) = event.reference.parse() {
                    event.reason = for_person(&event.reason, &reference);
                }
                display.show(&event);
                if event.state() != State::Pulling {
                    ended.push(event);
                }
            }
            if ended.len() == request_count { Ok(ended) } else { Err(ended_early()) }
        })
        .await
    });
    display.end();
    let ended = [wrong, ended?].concat();
    let failed: Vec<_> = ended.iter().filter(|event| event.state() == State::Failed).collect();
    // The display has shown failures already, so only the structured output lists them.
    output.result(&ended.iter().map(json).collect::<Vec<_>>(), Vec::new)?;
    match failed.len() {
        0 => Ok(()),
        failures => {
            let names: Vec<_> = failed.iter().map(|event| event.reference.as_str()).collect();
            Err(format!("{failures} of {count} are not on this node: {}", names.join(", ")))
        }
    }
}

impl WarmArguments {
    /// Adds the references of the file. Returns its invalid lines: they count as failed, and the others are fetched.
    fn read_list(&mut self) -> Result<Vec<WarmEvent>, CommandError> {
        let mut wrong = Vec::new();
        let Some(file) = &self.file else { return Ok(wrong) };
        let shown = file.display();
        let text = std::fs::read_to_string(file)
            .map_err(|error| format!("the list {shown} cannot be read: {error}"))?;
        for (number, line) in text.lines().enumerate() {
            let line = line.split('#').next().unwrap_or_default().trim();
            if line.is_empty() {
                continue;
            }
            match line.parse::<Reference>() {
                Ok(reference) => self.references.push(reference),
                Err(error) => wrong.push(WarmEvent {
                    reference: format!("line {} of {shown}", number + 1),
                    state: State::Failed.into(),
                    reason: error.to_string(),
                    ..WarmEvent::default()
                }),
            }
        }
        if self.references.is_empty() && wrong.is_empty() {
            return Err(format!("the list {shown} names nothing"));
        }
        Ok(wrong)
    }
}

/// The display of progress: bars on a terminal; otherwise a line for each end, and rarely one for a long pull.
struct ProgressDisplay<'a> {
    output: &'a OutputArguments,
    bars: Option<MultiProgress>,
    by_reference: HashMap<String, ProgressBar>,
    last_lines: HashMap<String, Instant>,
}

impl<'a> ProgressDisplay<'a> {
    fn new(output: &'a OutputArguments) -> Self {
        let bars = (output.is_text() && std::io::stderr().is_terminal()).then(MultiProgress::new);
        Self { output, bars, by_reference: HashMap::new(), last_lines: HashMap::new() }
    }

    /// Removes the bars.
    fn end(&self) {
        if let Some(bars) = &self.bars {
            // A terminal that has gone needs no update.
            let _ = bars.clear();
        }
    }

    fn show(&mut self, event: &WarmEvent) {
        match event.state() {
            State::Pulling | State::Unspecified => self.step(event),
            State::Done | State::Failed => {
                if let Some(bar) = self.by_reference.remove(&event.reference) {
                    bar.finish_and_clear();
                }
                let line = match event.state() {
                    State::Failed => format!("failed  {}: {}", event.reference, event.reason),
                    _ => format!(
                        "done    {}  {}  {}",
                        event.reference,
                        text_table::short(&event.digest),
                        Bytes(event.total_bytes)
                    ),
                };
                match &self.bars {
                    Some(bars) => bars.suspend(|| print(&line)),
                    None => self.output.text(&line),
                }
            }
        }
    }

    fn step(&mut self, event: &WarmEvent) {
        let Some(bars) = &self.bars else {
            let last_lines =
                self.last_lines.entry(event.reference.clone()).or_insert_with(Instant::now);
            if self.output.is_text() && last_lines.elapsed() >= LINE_INTERVAL {
                *last_lines = Instant::now();
                print_error(&line(event));
            }
            return;
        };
        let bar = self.by_reference.entry(event.reference.clone()).or_insert_with(|| {
            let bar = bars.add(ProgressBar::new(event.total_bytes));
            let style = "{prefix} {wide_bar} {bytes}/{total_bytes} {binary_bytes_per_sec} {eta}";
            match ProgressStyle::with_template(style) {
                Ok(style) => bar.set_style(style),
                Err(error) => print_error(&error.to_string()),
            }
            bar.set_prefix(event.reference.clone());
            bar.enable_steady_tick(Duration::from_millis(250));
            bar
        });
        bar.set_length(event.total_bytes);
        bar.set_position(event.done_bytes);
    }
}

/// Returns a line such as `pulling REF  1.2 GiB of 2.7 GiB  12.0 MiB/s`.
fn line(event: &WarmEvent) -> String {
    let (done, total) = (Bytes(event.done_bytes), Bytes(event.total_bytes));
    format!("pulling {}  {done} of {total}  {}/s", event.reference, Bytes(event.bytes_per_second))
}

fn json(event: &WarmEvent) -> serde_json::Value {
    let failed = event.state() == State::Failed;
    serde_json::json!({
        "reference": event.reference,
        "done": !failed,
        "digest": event.digest,
        "bytes": event.total_bytes,
        "reason": event.reason,
    })
}
