//! Tests connections and registries that break, stall, trickle or refuse: right content or the contract's code, in
//! bounded time.

use std::{
    fs,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use axum::body::Bytes;
use tonic::Code;

use crate::support::{
    Answer, AnswerBody, FakeRegistry, Image, Layer, Manifest, Node, OCI_TAR, Request, Tar, Volume,
    digest, noise, small_artifact,
};

/// Short timeouts and small parts, so that a test takes seconds instead of minutes.
const IMPATIENT: &str = "apiVersion: oci.custom.io/v1alpha1\nkind: NodeConfiguration\n\
    cache: {minFreePercent: 0, minFreeInodesPercent: 0}\n\
    pull: {stallTimeout: 1s, attempts: 3, rangeBytes: 1048576, ranges: 4, leastBytesPerSecond: 20000}\n";

/// A node with a scripted registry.
struct ScriptedNode {
    node: Node,
    fake: FakeRegistry,
    content: Vec<u8>,
}

impl ScriptedNode {
    /// Puts an artifact of one file of this size.
    fn new(size: usize) -> Self {
        Self::with(IMPATIENT, size)
    }

    fn with(configuration: &str, size: usize) -> Self {
        let node = Node::start_with(|sandbox, options| {
            let file = sandbox.path().join("config.yaml");
            fs::write(&file, configuration).expect("a configuration");
            options.argument(&format!("--config={}", file.display()))
        });
        let (fake, content) = (FakeRegistry::new(), noise(size, 77));
        Manifest::artifact([Layer::titled("file", content.clone())]).push(&fake, "hostile", "v1");
        Self { node, fake, content }
    }

    fn volume(&self) -> Volume {
        self.node.kubelet.new_volume(&self.fake.reference("v1"))
    }

    /// Publishes, and asserts the right content.
    #[track_caller]
    fn publishes(&self) {
        self.comes_to(&self.volume());
    }

    #[track_caller]
    fn comes_to(&self, volume: &Volume) {
        self.node.kubelet.publish_well(volume);
        let file = fs::read(volume.target().join("file")).expect("the file");
        assert!(file == self.content, "other content than was pushed");
        self.node.kubelet.unpublish(volume);
    }

    /// Returns the requested ranges of the file, in order: first and last byte.
    fn ranges(&self) -> Vec<Option<(u64, Option<u64>)>> {
        let blob = digest(&self.content);
        let requests = self.fake.requests();
        requests.iter().filter(|request| request.path.ends_with(&blob)).map(range).collect()
    }

    /// Answers the n-th request for the file, from 0, with the result of `answer`.
    fn nth(
        &self,
        answer: impl Fn(usize, &Request, &[u8]) -> Option<Answer> + Send + Sync + 'static,
    ) {
        let (count, content) = (AtomicUsize::new(0), self.content.clone());
        let blob = digest(&content);
        self.fake.script(move |request| {
            if !request.path.ends_with(&blob) {
                return None;
            }
            answer(count.fetch_add(1, Ordering::Relaxed), request, &content)
        });
    }
}

fn range(request: &Request) -> Option<(u64, Option<u64>)> {
    let (start, end) = request.header("range")?.strip_prefix("bytes=")?.split_once('-')?;
    Some((start.parse().ok()?, end.parse().ok()))
}

/// Returns the answer of a server that supports ranges.
fn part(request: &Request, content: &[u8]) -> Answer {
    let Some((start, end)) = range(request) else { return Answer::bytes(content.to_vec()) };
    let start = usize::try_from(start).expect("an offset");
    let last = content.len() - 1;
    let end = end.map_or(last, |end| usize::try_from(end).expect("an end").min(last));
    Answer::bytes(content[start..=end].to_vec())
        .with_status(206)
        .with_header("content-range", &format!("bytes {start}-{end}/{}", content.len()))
}

/// Returns the same answer in small pieces with pauses.
fn slowly(answer: Answer) -> Answer {
    let AnswerBody::Whole(bytes) = answer.body else { return answer };
    let (piece, pause) = (64 << 10, Duration::from_millis(20));
    Answer {
        body: AnswerBody::Slow { announced: bytes.len() as u64, bytes, piece, pause },
        ..answer
    }
}

/// Returns this many bytes of the answer, and then stalls or ends the connection.
fn cut(answer: Answer, length: usize, stalls: bool) -> Answer {
    let AnswerBody::Whole(bytes) = answer.body else { return answer };
    let (announced, bytes) = (bytes.len() as u64, bytes.slice(..length.min(bytes.len())));
    let body = if stalls {
        AnswerBody::Stalled { announced, bytes }
    } else {
        AnswerBody::Broken { announced, bytes }
    };
    Answer { body, ..answer }
}

#[test]
fn a_large_blob_on_a_slow_wire_comes_in_parts_at_once() {
    let scripted = ScriptedNode::new(12 << 20);
    scripted.nth(|_, request, content| Some(slowly(part(request, content))));
    scripted.publishes();
    let ranges = scripted.ranges();
    assert_eq!(ranges[0], None, "the first request has no range");
    assert!(ranges.len() > 4, "{ranges:?}");
    assert!(ranges[1..].iter().all(Option::is_some), "{ranges:?}");
}

#[test]
fn a_registry_that_ignores_ranges_is_asked_for_one_whole() {
    let scripted = ScriptedNode::new(8 << 20);
    scripted.nth(|_, _, content| Some(slowly(Answer::bytes(content.to_vec()))));
    scripted.publishes();
    assert!(scripted.ranges().len() <= 2, "{:?}", scripted.ranges());
}

#[test]
fn parts_that_are_refused_or_others_than_asked_for_are_done_without() {
    type Refuse = fn(&Request, &[u8]) -> Answer;
    let ways: [Refuse; 4] = [
        |_, _| Answer::status(400),
        |_, _| Answer::status(403),
        |_, _| Answer::status(416),
        |request, content| {
            let mut wrong = part(request, content);
            wrong.headers.clear();
            wrong.with_header("content-range", &format!("bytes 0-5/{}", content.len()))
        },
    ];
    for way in ways {
        let scripted = ScriptedNode::new(8 << 20);
        scripted.nth(move |_, request, content| {
            let asks_for_part = range(request).is_some();
            Some(if asks_for_part { way(request, content) } else { slowly(part(request, content)) })
        });
        scripted.publishes();
    }
}

#[test]
fn a_connection_that_is_cut_anywhere_goes_on_where_it_broke() {
    let scripted = ScriptedNode::new(300_000);
    scripted.nth(|number, request, content| {
        let lengths = [0, 1, 65_536, 100_000, 3];
        let whole = part(request, content);
        Some(lengths.get(number).map_or(whole.clone(), |length| cut(whole, *length, false)))
    });
    scripted.publishes();
    let starts: Vec<_> =
        scripted.ranges().iter().map(|range| range.map_or(0, |(start, _)| start)).collect();
    assert_eq!(starts, [0, 0, 1, 65_537, 165_537, 165_540]);
}

#[test]
fn a_connection_that_stalls_is_given_up_and_another_goes_on() {
    let scripted = ScriptedNode::new(300_000);
    scripted.nth(|number, request, content| {
        let whole = part(request, content);
        Some(if number == 0 { cut(whole, 100_000, true) } else { whole })
    });
    scripted.publishes();
    assert_eq!(scripted.ranges(), [None, Some((100_000, None))]);
}

#[test]
fn a_registry_that_only_trickles_is_unavailable_in_bounded_time() {
    let scripted = ScriptedNode::new(8 << 20);
    scripted.nth(|_, request, content| {
        let AnswerBody::Whole(bytes) = part(request, content).body else { return None };
        let (piece, pause) = (100, Duration::from_millis(50));
        Some(Answer::body(AnswerBody::Slow { announced: bytes.len() as u64, bytes, piece, pause }))
    });
    let volume = scripted.volume();
    scripted.node.kubelet.publish_badly(&volume, Code::Unavailable);
}

/// The two blobs alternate in turns that are shorter than the window of their rate.
#[test]
fn blobs_that_trickle_in_turns_are_found_out() {
    let turns = IMPATIENT
        .replace("stallTimeout: 1s, attempts: 3", "stallTimeout: 30s, attempts: 1, downloads: 1");
    let scripted = ScriptedNode::with(&turns, 1);
    let files: Vec<_> = (0..2).map(|seed| noise(8 << 20, seed)).collect();
    let layers =
        files.iter().zip(["one", "two"]).map(|(file, name)| Layer::titled(name, file.clone()));
    Manifest::artifact(layers).push(&scripted.fake, "hostile", "both");
    let files: Vec<_> = files.into_iter().map(|file| (digest(&file), file)).collect();
    scripted.fake.script(move |request| {
        let (_, content) = files.iter().find(|(blob, _)| request.path.ends_with(blob))?;
        let answer = part(request, content);
        // Only a host that has sent a part is known to have the rest later.
        if range(request).is_none() {
            return Some(cut(answer, 100_000, false));
        }
        let AnswerBody::Whole(bytes) = answer.body else { return None };
        let (announced, piece, pause) = (bytes.len() as u64, 100, Duration::from_millis(500));
        let body = AnswerBody::Slow { announced, bytes, piece, pause };
        Some(Answer { body, ..answer })
    });
    let volume = scripted.node.kubelet.new_volume(&scripted.fake.reference("both"));
    scripted.node.kubelet.publish_badly(&volume, Code::Unavailable);
}

/// Returns the answer of a server that has only a part of the content.
fn part_of_less(request: &Request, content: &[u8]) -> Answer {
    match range(request) {
        Some((start, _)) if start >= content.len() as u64 => {
            Answer::status(416).with_header("content-range", &format!("bytes */{}", content.len()))
        }
        _ => part(request, content),
    }
}

#[test]
fn a_blob_shorter_than_its_manifest_says_is_found_out_after_a_few_requests() {
    type Send = fn(Answer) -> Answer;
    let ways: [(Send, usize); 2] = [
        (|answer| answer, 2),
        // Its length is known only from its end.
        (
            |answer| {
                let AnswerBody::Whole(bytes) = answer.body else { return answer };
                Answer { body: AnswerBody::Unannounced(bytes), ..answer }
            },
            4,
        ),
    ];
    for (way, most) in ways {
        let scripted = ScriptedNode::new(300_000);
        scripted
            .nth(move |_, request, content| Some(way(part_of_less(request, &content[..290_000]))));
        scripted.node.kubelet.publish_badly(&scripted.volume(), Code::Internal);
        assert!(scripted.ranges().len() <= most, "{:?}", scripted.ranges());
    }
}

#[test]
fn a_registry_without_ranges_whose_connections_are_cut_is_given_up() {
    let scripted = ScriptedNode::new(300_000);
    scripted.nth(|number, _, content| {
        // A little more each time: the repeated bytes are no progress.
        Some(cut(Answer::bytes(content.to_vec()), 100_000 + number, false))
    });
    scripted.node.kubelet.publish_badly(&scripted.volume(), Code::Unavailable);
    assert!(scripted.ranges().len() < 12, "{:?}", scripted.ranges());
}

#[test]
fn one_connection_of_several_that_is_refused_does_not_end_the_others() {
    let scripted = ScriptedNode::new(12 << 20);
    scripted.nth(|number, request, content| {
        // Longer than the driver waits: requests meanwhile are refused without a call to the registry.
        let refused = || Answer::status(429).with_header("retry-after", "6");
        Some(if number == 3 { refused() } else { slowly(part(request, content)) })
    });
    scripted.publishes();
    assert!(scripted.ranges().len() > 4, "{:?}", scripted.ranges());
}

#[test]
fn parts_with_wrong_bytes_are_fetched_again_as_one_whole() {
    let scripted = ScriptedNode::new(8 << 20);
    scripted.nth(|_, request, content| {
        let other = noise(content.len(), 78);
        let content = if range(request).is_some() { &other } else { content };
        Some(slowly(part(request, content)))
    });
    scripted.publishes();
    let ranges = scripted.ranges();
    assert!(ranges.len() > 2 && ranges.last() == Some(&None), "{ranges:?}");
}

#[test]
fn a_configuration_that_trickles_is_given_up_as_a_blob_is() {
    let scripted = ScriptedNode::new(1);
    let (config, archive) = (vec![b' '; 1 << 20], Tar::new().file("file", 0o644, "x").finish());
    let described = |media_type: &str, bytes: &[u8]| serde_json::json!({"mediaType": media_type, "digest": digest(bytes), "size": bytes.len()});
    scripted.fake.put_json(
        "slow",
        &serde_json::json!({
            "schemaVersion": 2,
            "config": described("application/vnd.oci.image.config.v1+json", &config),
            "layers": [described(OCI_TAR, &archive)],
        }),
    );
    let blob = digest(&config);
    scripted.fake.script(move |request| {
        let (bytes, announced) = (Bytes::from(config.clone()), 1 << 20);
        let (piece, pause) = (100, Duration::from_millis(50));
        let slow = AnswerBody::Slow { announced, bytes, piece, pause };
        request.path.ends_with(&blob).then(|| Answer::body(slow))
    });
    let volume = scripted.node.kubelet.new_volume(&scripted.fake.reference("slow"));
    scripted.node.kubelet.publish_badly(&volume, Code::Unavailable);
}

/// Content that came from another registry has to be sent by this one too, which takes as long.
#[test]
fn a_proof_of_content_goes_on_where_its_connection_broke() {
    let scripted = ScriptedNode::new(300_000);
    let first = FakeRegistry::new();
    let layer = Layer::titled("file", scripted.content.clone());
    Manifest::artifact([layer]).push(&first, "hostile", "v1");
    let (here, _) = scripted.node.mount(&first.reference("v1"));
    scripted.nth(|number, request, content| {
        let whole = part(request, content);
        Some(if number == 0 { cut(whole, 100_000, false) } else { whole })
    });
    scripted.publishes();
    assert_eq!(scripted.ranges(), [None, Some((100_000, None))]);
    scripted.node.kubelet.unpublish(&here);
}

#[test]
fn a_source_that_changed_under_a_download_is_found_out_and_fetched_again_once() {
    let scripted = ScriptedNode::new(300_000);
    scripted.nth(|number, request, content| {
        let other = noise(content.len(), 78);
        Some(if number == 0 {
            cut(part(request, &other), 100_000, false)
        } else {
            part(request, content)
        })
    });
    scripted.publishes();
    assert_eq!(scripted.ranges(), [None, Some((100_000, None)), None]);
}

#[test]
fn a_presigned_address_that_expires_in_the_middle_is_asked_for_again() {
    let scripted = ScriptedNode::new(300_000);
    let storage = FakeRegistry::new();
    let (content, served) = (scripted.content.clone(), AtomicUsize::new(0));
    storage.script(move |request| {
        let signature: usize = request.query.strip_prefix("signature=")?.parse().ok()?;
        // Each address is good for one request, which breaks off; the request to the third succeeds.
        Some(match served.fetch_add(1, Ordering::Relaxed) {
            0 | 2 => cut(part(request, &content), 100_000, false),
            1 | 3 => Answer::status(403),
            _ if signature >= 4 => part(request, &content),
            _ => Answer::status(403),
        })
    });
    let host = storage.host();
    scripted.nth(move |number, _, _| {
        let address = format!("http://{host}/bucket/blob?signature={number}");
        Some(Answer::status(307).with_header("location", &address))
    });
    scripted.publishes();
    assert_eq!(storage.requests().len(), 5);
    assert_eq!(range(&storage.requests()[4]), Some((200_000, None)));
}

#[test]
fn a_registry_that_asks_for_patience_gets_it() {
    for status in [429, 503] {
        let scripted = ScriptedNode::new(1000);
        scripted.nth(move |number, request, content| {
            Some(match number {
                0 => Answer::status(status).with_header("retry-after", "1"),
                1 => Answer::status(status),
                _ => part(request, content),
            })
        });
        let started = Instant::now();
        scripted.publishes();
        assert!(started.elapsed() > Duration::from_secs(1), "{status}");
        assert_eq!(scripted.ranges().len(), 3);
    }
}

#[test]
fn a_registry_that_wants_to_be_left_alone_for_long_is_unavailable_and_left_alone() {
    let scripted = ScriptedNode::new(1000);
    scripted.nth(|_, _, _| Some(Answer::status(429).with_header("retry-after", "3000")));
    for _ in 0..3 {
        scripted.node.kubelet.publish_badly(&scripted.volume(), Code::Unavailable);
    }
    assert_eq!(scripted.ranges().len(), 1);
}

#[test]
fn a_registry_that_asks_for_a_password_in_the_middle_gets_it() {
    let scripted = ScriptedNode::new(300_000);
    scripted.nth(|number, request, content| {
        let whole = part(request, content);
        Some(match number {
            0 => cut(whole, 100_000, false),
            _ if request.header("authorization").is_none() => Answer::error(401, "UNAUTHORIZED")
                .with_header("www-authenticate", "Basic realm=\"test\""),
            _ => whole,
        })
    });
    let volume = scripted.volume().secret("username", "user").secret("password", "password");
    scripted.comes_to(&volume);
    assert_eq!(scripted.ranges().last(), Some(&Some((100_000, None))));
}

#[test]
fn what_a_registry_refused_is_not_asked_again_at_once() {
    let scripted = ScriptedNode::new(1000);
    for (tag, status, code) in [
        ("a", 404, Code::NotFound),
        ("b", 401, Code::Unauthenticated),
        ("c", 403, Code::PermissionDenied),
    ] {
        scripted.fake.script(move |request| {
            request.path.contains("/manifests/").then(|| Answer::error(status, "DENIED"))
        });
        let before = scripted.fake.requests().len();
        for _ in 0..20 {
            let volume = scripted.node.kubelet.new_volume(&scripted.fake.reference(tag));
            let _ = scripted.node.kubelet.publish_badly(&volume, code);
        }
        let asked = scripted.fake.requests().len() - before;
        assert!(asked < 20, "{status}: {asked} requests for twenty pods");
    }
}

#[test]
fn a_layer_that_was_refused_is_not_fetched_again_to_be_refused_again() {
    let scripted = ScriptedNode::new(1);
    let archive = Tar::new().file("ok", 0o644, "ok").file("../outside", 0o644, "no").finish();
    let blob = digest(&archive);
    Image::new().packed_layer(OCI_TAR, archive.clone(), &archive).push(
        &scripted.fake,
        "hostile",
        "bad",
    );
    for _ in 0..3 {
        let volume = scripted.node.kubelet.new_volume(&scripted.fake.reference("bad"));
        scripted.node.kubelet.publish_badly(&volume, Code::FailedPrecondition);
    }
    let requests = scripted.fake.requests();
    assert_eq!(requests.iter().filter(|request| request.path.ends_with(&blob)).count(), 1);
}

/// Each connection has a thread that waits for bytes, and their number is limited.
#[test]
fn a_registry_that_lets_many_blobs_wait_keeps_no_other_from_working() {
    let scripted = ScriptedNode::new(1000);
    let volumes: Vec<_> = (0..150_u64)
        .map(|artifact| {
            let name = |number| format!("{artifact}-{number}");
            let files = (0..4).map(|number| Layer::titled(&name(number), name(number)));
            let tag = format!("many{artifact}");
            Manifest::artifact(files).push(&scripted.fake, "hostile", &tag);
            let volume = scripted.node.kubelet.new_volume(&scripted.fake.reference(&tag));
            scripted.node.kubelet.prepare(&volume);
            volume
        })
        .collect();
    scripted.fake.script(|request| {
        let is_blob = request.path.contains("/blobs/");
        // The registry asks for patience with this blob; it is not avoided for others.
        is_blob.then(|| Answer::status(500).with_header("retry-after", "200"))
    });
    std::thread::scope(|scope| {
        let kubelet = &scripted.node.kubelet;
        let publish = |volume: &Volume| kubelet.publish_request(volume.request.clone());
        let calls: Vec<_> =
            volumes.iter().map(|volume| scope.spawn(move || publish(volume))).collect();
        crate::support::wait_until("many blobs wait", || scripted.node.driver.threads() > 90);
        let (other, _) =
            scripted.node.mount(&scripted.node.proxy.reference(&small_artifact().name));
        kubelet.unpublish(&other);
        // Threads that are idle for ten seconds end: the remaining ones belong to the blobs.
        crate::support::wait_until("few threads wait", || scripted.node.driver.threads() < 200);
        scripted.node.driver.terminate_hard();
        for call in calls {
            assert!(call.join().expect("the call").is_err());
        }
    });
}

/// Two registries use all connections together, and ask to be called again in minutes.
#[test]
fn blobs_that_wait_long_for_their_registry_give_way_to_others() {
    let few = IMPATIENT.replace("attempts: 3", "attempts: 3, downloads: 1");
    let scripted = ScriptedNode::with(&few, 1000);
    let other = FakeRegistry::new();
    let volumes: Vec<_> = [&scripted.fake, &other]
        .into_iter()
        .flat_map(|registry| {
            registry.script(|request| {
                let is_blob = request.path.contains("/blobs/");
                is_blob.then(|| Answer::status(500).with_header("retry-after", "200"))
            });
            (0..6).map(move |number| {
                let tag = format!("v{number}-{}", registry.host().replace(':', "-"));
                Manifest::artifact([Layer::titled(&tag, tag.clone())])
                    .push(registry, "hostile", &tag);
                registry.reference(&tag)
            })
        })
        .map(|reference| {
            let volume = scripted.node.kubelet.new_volume(&reference);
            scripted.node.kubelet.prepare(&volume);
            volume
        })
        .collect();
    let asked = || {
        let requests = [scripted.fake.requests(), other.requests()].concat();
        requests.iter().filter(|request| request.path.contains("/blobs/")).count()
    };
    std::thread::scope(|scope| {
        let kubelet = &scripted.node.kubelet;
        let publish = |volume: &Volume| kubelet.publish_request(volume.request.clone());
        let calls: Vec<_> =
            volumes.iter().map(|volume| scope.spawn(move || publish(volume))).collect();
        // A blob that waits for one of the eight connections gets it, and all have been requested once.
        crate::support::wait_until("all blobs have had a place", || asked() == volumes.len());
        let (quick, _) =
            scripted.node.mount(&scripted.node.proxy.reference(&small_artifact().name));
        kubelet.unpublish(&quick);
        let has_ended = |call: &std::thread::ScopedJoinHandle<'_, _>| call.is_finished();
        crate::support::wait_until("some have given way", || {
            calls.iter().filter(|call| has_ended(call)).count() >= 5
        });
        let (ended, waiting): (Vec<_>, Vec<_>) = calls.into_iter().partition(has_ended);
        for call in ended {
            let refused = call.join().expect("the call").expect_err("it gave way");
            assert_eq!(refused.code(), Code::Unavailable);
            assert!(refused.message().contains("500"), "{refused}");
        }
        scripted.node.driver.terminate_hard();
        for call in waiting {
            assert!(call.join().expect("the call").is_err());
        }
    });
}

#[test]
fn a_rate_that_was_set_is_kept() {
    let limited = "apiVersion: oci.custom.io/v1alpha1\nkind: NodeConfiguration\n\
        cache: {minFreePercent: 0, minFreeInodesPercent: 0}\n\
        pull: {bytesPerSecond: 2000000}\n";
    let scripted = ScriptedNode::with(limited, 4_000_000);
    let started = Instant::now();
    scripted.publishes();
    assert!(started.elapsed() > Duration::from_millis(1800), "{:?}", started.elapsed());
}

#[test]
fn a_redirect_to_an_address_of_a_private_network_is_not_followed() {
    let scripted = ScriptedNode::new(1000);
    scripted.nth(|_, _, _| {
        Some(Answer::status(307).with_header("location", "http://169.254.169.254/latest/meta-data"))
    });
    let message = scripted.node.kubelet.publish_badly(&scripted.volume(), Code::Internal);
    assert!(!message.contains("169.254"), "{message}");
}

#[test]
fn a_download_in_parts_goes_on_after_the_driver_was_killed() {
    let mut scripted = ScriptedNode::new(16 << 20);
    let slow = Arc::new(AtomicUsize::new(1));
    let is_slow = Arc::clone(&slow);
    scripted.nth(move |_, request, content| {
        let whole = part(request, content);
        Some(if is_slow.load(Ordering::Relaxed) == 1 { slowly(whole) } else { whole })
    });
    let volume = scripted.volume();
    scripted.node.kubelet.prepare(&volume);
    let partial = scripted.node.driver.options.state.join("partial");
    let is_recorded = || {
        let files = std::fs::read_dir(&partial).into_iter().flatten().flatten();
        let mut records = files.filter(|file| file.path().extension() == Some("ranges".as_ref()));
        records.any(|record| std::fs::read(record.path()).is_ok_and(|ranges| ranges != b"[]"))
    };
    std::thread::scope(|scope| {
        let call = scope.spawn(|| scripted.node.kubelet.publish_request(volume.request.clone()));
        crate::support::wait_until("several parts are on their way and recorded", || {
            scripted.ranges().len() > 4 && is_recorded()
        });
        scripted.node.driver.terminate_hard();
        assert!(call.join().expect("the call").is_err());
    });
    slow.store(0, Ordering::Relaxed);
    let before = scripted.ranges().len();
    let options = scripted.node.driver.options.clone();
    scripted.node.driver = options.start();
    scripted.comes_to(&volume);
    let after = &scripted.ranges()[before..];
    assert!(after.iter().all(Option::is_some), "what was here is not fetched again: {after:?}");
}
