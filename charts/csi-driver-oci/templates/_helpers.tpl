{{- define "csi-driver-oci.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 63 | trimSuffix "-" }}
{{- end }}

{{- define "csi-driver-oci.fullname" -}}
{{- if .Values.fullnameOverride }}
{{- .Values.fullnameOverride | trunc 54 | trimSuffix "-" }}
{{- else if contains (include "csi-driver-oci.name" .) .Release.Name }}
{{- .Release.Name | trunc 54 | trimSuffix "-" }}
{{- else }}
{{- printf "%s-%s" .Release.Name (include "csi-driver-oci.name" .) | trunc 54 | trimSuffix "-" }}
{{- end }}
{{- end }}

{{- define "csi-driver-oci.selectorLabels" -}}
app.kubernetes.io/name: {{ include "csi-driver-oci.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "csi-driver-oci.labels" -}}
{{ include "csi-driver-oci.selectorLabels" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" | trunc 63 | trimSuffix "-" }}
{{- end }}

{{/* The labels of an object of one component: node, controller and so on. They are not part of any selector. */}}
{{- define "csi-driver-oci.componentLabels" -}}
{{ include "csi-driver-oci.labels" (first .) }}
app.kubernetes.io/component: {{ last . }}
{{- end }}

{{- define "csi-driver-oci.serviceAccountName" -}}
{{- if .Values.serviceAccount.create }}
{{- default (include "csi-driver-oci.fullname" .) .Values.serviceAccount.name }}
{{- else }}
{{- default "default" .Values.serviceAccount.name }}
{{- end }}
{{- end }}

{{- define "csi-driver-oci.image" -}}
{{- $tag := printf ":%s" (default .Chart.AppVersion .Values.image.tag) }}
{{- $version := ternary (printf "@%s" .Values.image.digest) $tag (ne .Values.image.digest "") }}
{{- include "csi-driver-oci.inRegistry" (list . (printf "%s%s" .Values.image.repository $version)) }}
{{- end }}

{{/* An image, from global.imageRegistry if that is set: the registry of its name, if it has one, is replaced. */}}
{{- define "csi-driver-oci.inRegistry" -}}
{{- $root := first . }}
{{- $image := last . }}
{{- $registry := dig "imageRegistry" "" ($root.Values.global | default dict) }}
{{- if $registry }}
{{- printf "%s/%s" (trimSuffix "/" $registry) (regexReplaceAll "^([^/]*[.:][^/]*|localhost)/" $image "") }}
{{- else }}
{{- $image }}
{{- end }}
{{- end }}

{{/* A Kubernetes quantity as a whole number of bytes. YAML reads some of them as numbers. */}}
{{- define "csi-driver-oci.bytes" -}}
{{- $text := ternary (printf "%.0f" .) (toString .) (kindIs "float64" .) }}
{{- $units := dict "" 1.0 "Ki" 1024.0 "Mi" 1048576.0 "Gi" 1073741824.0 "Ti" 1099511627776.0 "k" 1000.0 "M" 1000000.0 "G" 1000000000.0 "T" 1000000000000.0 }}
{{- $unit := regexFind "(Ki|Mi|Gi|Ti|k|M|G|T)$" $text }}
{{- mulf (trimSuffix $unit $text | float64) (get $units $unit) | printf "%.0f" }}
{{- end }}

{{/* Identifies a node plugin by its node, because the name of its pod changes with every update. */}}
{{- define "csi-driver-oci.nodeRelabelling" -}}
- sourceLabels: [__meta_kubernetes_pod_node_name]
  targetLabel: node
{{- end }}

{{/* The address of probes: with the host's network the loopback, which no other machine can reach. */}}
{{- define "csi-driver-oci.healthAddress" -}}
{{ if .Values.hostNetwork }}127.0.0.1{{ else }}[::]{{ end }}:{{ .Values.health.port }}
{{- end }}

{{- define "csi-driver-oci.controllerName" -}}
{{- printf "%s-fleet" (include "csi-driver-oci.fullname" .) }}
{{- end }}

{{/* Whether there is a controller at all: for preloads, for claims, or for both. */}}
{{- define "csi-driver-oci.hasController" -}}
{{- if or .Values.controller.enabled .Values.provisioner.enabled }}true{{ end }}
{{- end }}

{{/* Different from those of the node plugin, so that neither selects the other's pods. */}}
{{- define "csi-driver-oci.controllerSelectorLabels" -}}
app.kubernetes.io/name: {{ include "csi-driver-oci.name" . }}-controller
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}
