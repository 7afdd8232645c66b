{{/*
The configuration: what the driver reads, the ConfigMap that carries it, and the folders of the node that it names.
*/}}

{{/* Whether the driver gets a configuration file, from the chart's own ConfigMap or from another one. */}}
{{- define "csi-driver-oci.hasConfiguration" -}}
{{- if or .Values.config .Values.configFiles .Values.dockerConfigSecret .Values.existingConfigMap }}true{{ end }}
{{- end }}

{{/* The configuration file, as the driver reads it. */}}
{{- define "csi-driver-oci.configuration" -}}
{{- $config := deepCopy .Values.config }}
{{- if .Values.dockerConfigSecret }}
{{- $_ := set $config "registries" (merge (dict "dockerConfig" "/etc/csi-driver-oci-docker/config.json") ($config.registries | default dict)) }}
{{- end }}
{{- toYaml (merge (dict "apiVersion" "oci.custom.io/v1alpha1" "kind" "NodeConfiguration") $config) }}
{{- end }}

{{/* The sections that a driver reads only at its start. */}}
{{- define "csi-driver-oci.readAtStart" -}}
{{- toYaml (omit (include "csi-driver-oci.configuration" . | fromYaml) "policy" "warm") }}
{{- end }}

{{/* All files of the ConfigMap. */}}
{{- define "csi-driver-oci.configurationFiles" -}}
{{- toYaml (merge (dict "config.yaml" (printf "%s\n" (include "csi-driver-oci.configuration" .))) .Values.configFiles) }}
{{- end }}

{{/*
A changed configuration is another object, so that a rollback finds the old one's name again. What the driver reads
again by itself (config.policy, config.warm and the files beside) changes the object in place, and rolls no pod.
*/}}
{{- define "csi-driver-oci.configMapName" -}}
{{- if .Values.existingConfigMap }}
{{- .Values.existingConfigMap }}
{{- else }}
{{- printf "%s-%s" (include "csi-driver-oci.fullname" .) (include "csi-driver-oci.readAtStart" . | sha256sum | trunc 8) }}
{{- end }}
{{- end }}

{{/* The name of a CronJob has at most 52 characters. */}}
{{- define "csi-driver-oci.trustRootsName" -}}
{{- printf "%s-trust" (include "csi-driver-oci.fullname" . | trunc 46 | trimSuffix "-") }}
{{- end }}

{{/* The trust roots that the job fetches, as files of a container. */}}
{{- define "csi-driver-oci.trustRootMounts" -}}
{{- range .Values.trustRoots.instances }}
- name: trust-{{ .name }}
  mountPath: /etc/csi-driver-oci-trust/{{ .name }}
  readOnly: true
{{- end }}
{{- end }}

{{- define "csi-driver-oci.trustRootVolumes" -}}
{{- range .Values.trustRoots.instances }}
- name: trust-{{ .name }}
  configMap:
    name: {{ include "csi-driver-oci.trustRootsName" $ }}-{{ .name }}
    # The pod starts before the first trust root is there.
    optional: true
    items:
      - key: trusted_root.json
        path: trusted_root.json
{{- end }}
{{- end }}

{{/*
What of the node config.registries names: volume name -> path and type. A file is mounted by itself: its folder may be
the kubelet's own, whose mounts a copy in this container would hold busy.
*/}}
{{- define "csi-driver-oci.nodePaths" -}}
{{- $registries := .Values.config.registries | default dict }}
{{- $paths := dict }}
{{- range $index, $path := compact (splitList ":" ($registries.hostsDir | default "")) }}
{{- $_ := set $paths (printf "registry-hosts-%d" $index) (dict "path" $path "type" "DirectoryOrCreate") }}
{{- end }}
{{- with $registries.dockerConfig }}
{{- $_ := set $paths "docker-config" (dict "path" . "type" "File") }}
{{- end }}
{{- with $registries.credentialProviderConfig }}
{{- $_ := set $paths "credential-provider-config" (dict "path" . "type" "File") }}
{{- end }}
{{- with $registries.credentialProviderBinDir }}
{{- $_ := set $paths "credential-provider-bin" (dict "path" . "type" "Directory") }}
{{- end }}
{{- toYaml $paths }}
{{- end }}
