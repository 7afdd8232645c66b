//! Handles requests to the API server.

use std::collections::HashMap;

use axum::body::{Body, Bytes};
use futures_util::StreamExt as _;
use http::{Method, Response, request::Parts};
use serde_json::{Value, json};
use tokio_stream::wrappers::UnboundedReceiverStream;

use super::store::{Kind, Refusal, Store, WatchWanted, shown};

/// The object or collection of a path.
struct Asked {
    kind: Kind,
    namespace: Option<String>,
    name: Option<String>,
    is_status: bool,
}

pub(super) fn answer(store: &mut Store, parts: &Parts, body: &Bytes) -> Response<Body> {
    let Some(asked) = parse(parts.uri.path()) else {
        return status(404, &format!("no such path: {}", parts.uri.path()));
    };
    let writes = parts.method != Method::GET;
    if let Some(code) = store.fault(asked.kind, writes) {
        return status(code, "as it was told");
    }
    if writes && asked.kind != Kind::Lease {
        store.counts.writes += 1;
        store.counts.written_bytes += body.len() as u64;
    }
    let query: HashMap<String, String> = parts.uri.query().map(form).unwrap_or_default();
    let namespace = asked.namespace.clone().unwrap_or_default();
    let done = match (&parts.method, &asked.name) {
        (&Method::GET, None) if query.get("watch").is_some_and(|watch| watch == "true") => {
            return watch(store, asked, &query, metadata_only(parts));
        }
        (&Method::GET, None) => return list(store, &asked, &query, metadata_only(parts)),
        (&Method::GET, Some(name)) => {
            let found = store.get(asked.kind, &namespace, name);
            found.ok_or_else(|| (404, format!("{name} not found")))
        }
        (&Method::POST, None) => {
            let object = serde_json::from_slice(body).expect("JSON");
            store.create(asked.kind, &namespace, object)
        }
        (&Method::PUT, Some(name)) => {
            let object = serde_json::from_slice(body).expect("JSON");
            store.replace(asked.kind, &namespace, name, object)
        }
        (&Method::PATCH, Some(name)) => {
            let mut change: Value = serde_json::from_slice(body).expect("JSON");
            match parts.headers["content-type"].to_str() {
                Ok("application/merge-patch+json") => {}
                Ok("application/strategic-merge-patch+json") if asked.kind == Kind::Node => {
                    let known = store.get(asked.kind, &namespace, name).unwrap_or_default();
                    keep_conditions(&known, &mut change);
                }
                other => panic!("{other:?} is not understood"),
            }
            patch(store, &asked, &namespace, name, &change)
        }
        (&Method::DELETE, Some(name)) => delete(store, &asked, &namespace, name, body),
        _ => return status(405, "no such method"),
    };
    match done {
        Ok(object) => send(if parts.method == Method::POST { 201 } else { 200 }, &object),
        Err((code, reason)) => status(code, &reason),
    }
}

fn metadata_only(parts: &Parts) -> bool {
    let accepts = parts.headers.get("accept").and_then(|value| value.to_str().ok());
    accepts.is_some_and(|accepts| accepts.contains("PartialObjectMetadata"))
}

fn parse(path: &str) -> Option<Asked> {
    let rest = path.strip_prefix("/api/").or_else(|| path.strip_prefix("/apis/"))?;
    let kind_of = |group: &str, plural: &str| {
        Kind::ALL.into_iter().find(|kind| {
            let (known, name, _, _) = kind.about();
            known == group && name == plural
        })
    };
    let parts: Vec<&str> = rest.split('/').filter(|part| !part.is_empty()).collect();
    let (group, parts) = if path.starts_with("/apis/") {
        (parts.get(..2)?.join("/"), &parts[2..])
    } else {
        (parts.first()?.to_string(), &parts[1..])
    };
    let (namespace, parts) = match parts {
        ["namespaces", namespace, rest @ ..] if !rest.is_empty() => {
            (Some((*namespace).to_owned()), rest)
        }
        parts => (None, parts),
    };
    let kind = kind_of(&group, parts.first()?)?;
    let name = parts.get(1).map(|name| (*name).to_owned());
    Some(Asked { kind, namespace, name, is_status: parts.get(2) == Some(&"status") })
}

fn patch(
    store: &mut Store,
    asked: &Asked,
    namespace: &str,
    name: &str,
    change: &Value,
) -> Result<Value, Refusal> {
    let missing = || (404, format!("{name} not found"));
    let mut object = store.get(asked.kind, namespace, name).ok_or_else(missing)?;
    let before = object.clone();
    merge(&mut object, change);
    // A subresource changes its part and nothing else.
    if asked.is_status {
        object["spec"] = before["spec"].clone();
    } else if object.get("status").is_some() || before.get("status").is_some() {
        object["status"] = before["status"].clone();
    }
    store.replace(asked.kind, namespace, name, object)
}

fn delete(
    store: &mut Store,
    asked: &Asked,
    namespace: &str,
    name: &str,
    body: &Bytes,
) -> Result<Value, Refusal> {
    let missing = || (404, format!("{name} not found"));
    let known = store.get(asked.kind, namespace, name).ok_or_else(missing)?;
    let options: Value = serde_json::from_slice(body).unwrap_or_default();
    for field in ["uid", "resourceVersion"] {
        let wanted = &options["preconditions"][field];
        if !wanted.is_null() && *wanted != known["metadata"][field] {
            return Err((409, "the precondition does not hold".to_owned()));
        }
    }
    store.delete(asked.kind, namespace, name);
    Ok(known)
}

fn list(
    store: &Store,
    asked: &Asked,
    query: &HashMap<String, String>,
    metadata_only: bool,
) -> Response<Body> {
    let wanted_name = name_of_selector(query);
    let limit = query.get("limit").and_then(|limit| limit.parse().ok()).unwrap_or(usize::MAX);
    let skip = query.get("continue").and_then(|from| from.parse().ok()).unwrap_or(0_usize);
    let fits = |name: &&(Kind, String, String)| {
        asked.namespace.as_ref().is_none_or(|namespace| name.1 == *namespace)
            && wanted_name.as_ref().is_none_or(|wanted| name.2 == *wanted)
    };
    let all: Vec<&Bytes> =
        store.raw(asked.kind).filter(|(name, _)| fits(name)).map(|(_, bytes)| bytes).collect();
    let page: Vec<Bytes> =
        all.iter().skip(skip).take(limit).map(|bytes| shown(bytes, metadata_only)).collect();
    let end = skip + page.len();
    let more = if end < all.len() { end.to_string() } else { String::new() };
    let (group, _, kind, _) = asked.kind.about();
    let head = json!({"resourceVersion": store.version().to_string(), "continue": more});
    let mut text = format!(
        "{{\"apiVersion\":\"{group}\",\"kind\":\"{kind}List\",\"metadata\":{head},\"items\":["
    )
    .into_bytes();
    for (index, item) in page.iter().enumerate() {
        if index > 0 {
            text.push(b',');
        }
        text.extend_from_slice(item);
    }
    text.extend_from_slice(b"]}");
    respond(200, Body::from(text))
}

fn watch(
    store: &mut Store,
    asked: Asked,
    query: &HashMap<String, String>,
    metadata_only: bool,
) -> Response<Body> {
    let after = query.get("resourceVersion").and_then(|version| version.parse().ok());
    let wanted = WatchWanted {
        kind: asked.kind,
        namespace: asked.namespace,
        name: name_of_selector(query),
        metadata_only,
    };
    let Some(receiver) = store.watch(after.unwrap_or(0), wanted) else {
        let gone = json!({"type": "ERROR", "object": failure(410, "too old resource version")});
        return respond(200, Body::from(format!("{gone}\n")));
    };
    let lines = UnboundedReceiverStream::new(receiver);
    respond(200, Body::from_stream(lines.map(Ok::<_, std::convert::Infallible>)))
}

fn name_of_selector(query: &HashMap<String, String>) -> Option<String> {
    query.get("fieldSelector")?.strip_prefix("metadata.name=").map(str::to_owned)
}

/// Returns the parameters of a query.
fn form(query: &str) -> HashMap<String, String> {
    let decode = |text: &str| {
        let mut bytes = Vec::new();
        let mut rest = text.bytes();
        while let Some(byte) = rest.next() {
            bytes.push(match byte {
                b'+' => b' ',
                b'%' => {
                    let pair: String = rest.by_ref().take(2).map(char::from).collect();
                    u8::from_str_radix(&pair, 16).expect("an escape")
                }
                byte => byte,
            });
        }
        String::from_utf8(bytes).expect("text")
    };
    let pairs = query.split('&').filter_map(|pair| pair.split_once('='));
    pairs.map(|(key, value)| (decode(key), decode(value))).collect()
}

/// Merges by RFC 7386.
/// Adds the known conditions of other types to those of a strategic merge patch, which merges them by type.
fn keep_conditions(known: &Value, change: &mut Value) {
    let wanted = change.pointer_mut("/status/conditions").and_then(Value::as_array_mut);
    let Some(wanted) = wanted else { return };
    let mut all = known["status"]["conditions"].as_array().cloned().unwrap_or_default();
    for condition in wanted.drain(..) {
        match all.iter_mut().find(|known| known["type"] == condition["type"]) {
            Some(known) => merge(known, &condition),
            None => all.push(condition),
        }
    }
    *wanted = all;
}

fn merge(target: &mut Value, change: &Value) {
    let Value::Object(fields) = change else {
        *target = change.clone();
        return;
    };
    if !target.is_object() {
        *target = json!({});
    }
    let known = target.as_object_mut().expect("an object");
    for (key, value) in fields {
        if value.is_null() {
            known.remove(key);
        } else {
            merge(known.entry(key.clone()).or_insert(Value::Null), value);
        }
    }
}

fn failure(code: u16, message: &str) -> Value {
    let reason = match code {
        404 => "NotFound",
        409 => "Conflict",
        410 => "Expired",
        422 => "Invalid",
        429 => "TooManyRequests",
        _ => "InternalError",
    };
    let mut status = json!({
        "apiVersion": "v1", "kind": "Status", "metadata": {}, "status": "Failure",
        "message": message, "reason": reason, "code": code,
    });
    if code == 429 {
        status["details"] = json!({"retryAfterSeconds": 1});
    }
    status
}

fn status(code: u16, message: &str) -> Response<Body> {
    send(code, &failure(code, message))
}

fn send(code: u16, object: &Value) -> Response<Body> {
    respond(code, Body::from(object.to_string()))
}

fn respond(code: u16, body: Body) -> Response<Body> {
    let mut response = Response::builder().status(code).header("content-type", "application/json");
    if code == 429 {
        response = response.header("retry-after", "1");
    }
    response.body(body).expect("a response")
}
