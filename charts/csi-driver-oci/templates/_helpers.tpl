{{- define "csi-driver-oci.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 63 | trimSuffix "-" }}
{{- end }}

{{- define "csi-driver-oci.fullname" -}}
{{- if .Values.fullnameOverride }}
{{- .Values.fullnameOverride | trunc 63 | trimSuffix "-" }}
{{- else if contains (include "csi-driver-oci.name" .) .Release.Name }}
{{- .Release.Name | trunc 63 | trimSuffix "-" }}
{{- else }}
{{- printf "%s-%s" .Release.Name (include "csi-driver-oci.name" .) | trunc 63 | trimSuffix "-" }}
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

{{- define "csi-driver-oci.serviceAccountName" -}}
{{- if .Values.serviceAccount.create }}
{{- default (include "csi-driver-oci.fullname" .) .Values.serviceAccount.name }}
{{- else }}
{{- default "default" .Values.serviceAccount.name }}
{{- end }}
{{- end }}

{{- define "csi-driver-oci.image" -}}
{{- if .Values.image.digest }}
{{- printf "%s@%s" .Values.image.repository .Values.image.digest }}
{{- else }}
{{- printf "%s:%s" .Values.image.repository (default .Chart.AppVersion .Values.image.tag) }}
{{- end }}
{{- end }}

{{/* The configuration file, as the driver reads it. */}}
{{- define "csi-driver-oci.config" -}}
apiVersion: oci.custom.io/v1alpha1
kind: NodeConfiguration
{{ toYaml .Values.config }}
{{- end }}

{{/* A changed configuration is another object, so that a rollback finds the old one's name again. */}}
{{- define "csi-driver-oci.configMapName" -}}
{{- printf "%s-%s" (include "csi-driver-oci.fullname" . | trunc 54 | trimSuffix "-") (include "csi-driver-oci.config" . | sha256sum | trunc 8) }}
{{- end }}
