//! Cold publishes beside the tools that people know, and beside what the machine can do at all.
//!
//! ```text
//! mod         the cases, the rounds, the table
//! contents    what is fetched: files and images, made the same at every run
//! contenders  who fetches it, each with a command as a person would type it
//! meter       wall time, CPU time and peak memory of a process and its children
//! scratch     a fresh ext4 in memory for every run, so that the machine's disk does not decide
//! nginx       a server with TLS, or one that limits each connection, as real registries have and do
//! ```
//!
//! Contenders take turns within a round, another one first in each, so that a busy moment of
//! the machine hits them alike; medians are over the rounds. `BENCH_ROUNDS` (5), `BENCH_CASES` (all; a list like
//! `file,gzip`), `BENCH_WHO` (all; parts of their names, like `publish,oras`) and `BENCH_SCALE` (100:
//! per cent of the sizes) make a quick run.

mod contenders;
mod contents;
mod meter;
mod nginx;
mod scratch;

use std::time::Duration;

use contenders::{Contender, Source, contenders};
use contents::{Artifact, Case};
use meter::Measured;
use nginx::Nginx;
use scratch::Scratch;

use crate::common::support;

pub fn transfers() {
    let rounds = number("BENCH_ROUNDS", 5);
    let scale = number("BENCH_SCALE", 100);
    let wanted = std::env::var("BENCH_CASES").unwrap_or_default();
    let wanted: Vec<&str> = wanted.split(',').filter(|name| !name.is_empty()).collect();
    println!("{}\n", meter::machine());
    println!("medians of {rounds} rounds; sizes at {scale} %\n");
    for case in Case::ALL {
        if wanted.is_empty() || wanted.contains(&case.name()) {
            run_case(case, rounds, scale);
        }
    }
}

fn run_case(case: Case, rounds: usize, scale: usize) {
    let artifact = Artifact::push(case, scale);
    let front = match case {
        Case::Limited => Some(Nginx::limiting(support::registry())),
        Case::Tls => Some(Nginx::with_tls(support::registry())),
        _ => None,
    };
    let source = Source {
        host: front.as_ref().map_or_else(|| support::registry().host(), Nginx::host),
        authority: front.as_ref().and_then(Nginx::authority),
    };
    let wanted = std::env::var("BENCH_WHO").unwrap_or_default();
    let is_wanted = |contender: &Contender| {
        wanted.is_empty() || wanted.split(',').any(|name| contender.label().contains(name))
    };
    let contenders: Vec<_> = contenders(case).into_iter().filter(is_wanted).collect();
    println!("## {}: {}\n", case.name(), artifact.description);
    let mut results: Vec<Vec<Measured>> = contenders.iter().map(|_| Vec::new()).collect();
    for round in 0..rounds {
        for turn in 0..contenders.len() {
            // The first contender finds memory that the machine may have to get back from its host.
            let number = (round + turn) % contenders.len();
            let scratch = Scratch::new(case == Case::Confined);
            let confined = case == Case::Confined;
            results[number].push(contenders[number].run(&artifact, &source, &scratch, confined));
        }
    }
    print(&contenders, &results);
}

/// Prints the table. The driver comes first, and the others' times are divided by its time.
fn print(contenders: &[Contender], results: &[Vec<Measured>]) {
    println!(
        "| {:<52} | {:>8} | {:>8} | {:>9} | {:>14} |",
        "who", "wall s", "CPU s", "peak MiB", "driver / this"
    );
    println!("| {0:-<52} | {0:-<8} | {0:-<8} | {0:-<9} | {0:-<14} |", "");
    let ours = median(&results[0], |measured| measured.wall);
    for (contender, results) in contenders.iter().zip(results) {
        let wall = median(results, |measured| measured.wall);
        let cpu = median(results, |measured| measured.cpu);
        let peak = results.iter().filter_map(|measured| measured.peak_bytes).max();
        let peak = peak.map_or_else(|| "-".to_owned(), |bytes| (bytes >> 20).to_string());
        println!(
            "| {:<52} | {:>8.2} | {:>8.2} | {:>9} | {:>14.2} |",
            contender.label(),
            wall.as_secs_f64(),
            cpu.as_secs_f64(),
            peak,
            ours.as_secs_f64() / wall.as_secs_f64()
        );
    }
    println!();
}

fn median(results: &[Measured], of: impl Fn(&Measured) -> Duration) -> Duration {
    let mut times: Vec<_> = results.iter().map(of).collect();
    times.sort_unstable();
    times[times.len() / 2]
}

fn number(name: &str, default: usize) -> usize {
    std::env::var(name).ok().and_then(|text| text.parse().ok()).unwrap_or(default)
}
