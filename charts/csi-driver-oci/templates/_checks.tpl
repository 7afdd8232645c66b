{{/*
Combinations that the schema cannot name well. Nothing is rendered when one of them fails.
*/}}
{{- define "csi-driver-oci.checks" -}}
{{- if and (ne (index .Chart.Annotations "oci.custom.io/released") "true") (eq .Values.image.repository "ghcr.io/csi-driver-oci/csi-driver-oci") (not (dig "imageRegistry" "" (.Values.global | default dict))) }}
{{- fail (printf "this chart is not that of a release, and there is no published image of csi-driver-oci %s: build and push one (docker build -t registry.example.com/csi-driver-oci:%s . && docker push registry.example.com/csi-driver-oci:%s), then name it with --set image.repository=registry.example.com/csi-driver-oci" .Chart.AppVersion .Chart.AppVersion .Chart.AppVersion) }}
{{- end }}
{{- if and (semverCompare "<1.29.0-0" .Capabilities.KubeVersion.Version) (not .Values.sidecars.registrar.enabled) }}
{{- fail (printf "Kubernetes %s cannot register the driver by itself, which needs 1.29: set sidecars.registrar.enabled and sidecars.registrar.image" .Capabilities.KubeVersion.Version) }}
{{- end }}
{{- range $name, $sidecar := .Values.sidecars }}
{{- if and $sidecar.enabled (not $sidecar.image) }}
{{- fail (printf "sidecars.%s is enabled without an image: set sidecars.%s.image" $name $name) }}
{{- end }}
{{- end }}
{{- if and .Values.networkPolicy.enabled .Values.hostNetwork }}
{{- fail "networkPolicy does nothing for pods on the host's network: set hostNetwork to false, or networkPolicy.enabled to false" }}
{{- end }}
{{- if and .Values.existingConfigMap (or .Values.config .Values.configFiles .Values.dockerConfigSecret) }}
{{- fail "existingConfigMap takes the place of config, configFiles and dockerConfigSecret: set one or the other" }}
{{- end }}
{{- if and .Values.dockerConfigSecret (dig "registries" "dockerConfig" "" .Values.config) }}
{{- fail "dockerConfigSecret and config.registries.dockerConfig are two sources of the same file: set one" }}
{{- end }}
{{- $limit := dig "limits" "memory" "" .Values.resources }}
{{- if and $limit (not .Values.existingConfigMap) }}
{{- $limit = include "csi-driver-oci.bytes" $limit | int64 }}
{{- $memory := div $limit 8 | mul 3 | int64 }}
{{- with dig "pull" "memory" "" .Values.config }}
{{- $memory = include "csi-driver-oci.bytes" . | int64 }}
{{- end }}
{{- $unpacks := dig "pull" "unpacks" 4 .Values.config | int64 }}
{{- $beside := mul $unpacks 9437184 | add 67108864 }}
{{- if gt (add $memory $beside) $limit }}
{{- fail (printf "config.pull.memory is %d MiB, and beside it the driver takes up to %d MiB, which is more than the %d MiB of resources.limits.memory: lower one or raise the other" (div $memory 1048576) (div $beside 1048576) (div $limit 1048576)) }}
{{- end }}
{{- $fixed := mul $unpacks 9437184 | add 3145728 }}
{{- if gt (mul $fixed 2) $memory }}
{{- fail (printf "config.pull.unpacks: %d layers at once take %d MiB, more than half of the %d MiB of pull.memory (by default three eighths of resources.limits.memory): lower it, or raise the memory" $unpacks (div $fixed 1048576) (div $memory 1048576)) }}
{{- end }}
{{- $large := sub (sub (sub $memory $fixed) (div $memory 8)) (div $memory 48) }}
{{- $limits := dig "limits" dict .Values.config }}
{{- $needs := dict "entries" (dig "entries" 1000000 $limits | int64 | mul 120) "manifestBytes" (dig "manifestBytes" 4194304 $limits | int64 | mul 4) }}
{{- $windows := dict "27" 125829120 "28" 260046848 "29" 528482304 "30" 1065353216 "31" 2139095040 }}
{{- with get $windows (dig "zstdWindowLog" 27 $limits | int | toString) }}
{{- $_ := set $needs "zstdWindowLog" . }}
{{- end }}
{{- range $key, $bytes := $needs }}
{{- if gt ($bytes | int64) $large }}
{{- fail (printf "config.limits.%s: one artifact may take %d MiB of memory, and of the %d MiB of pull.memory (by default three eighths of resources.limits.memory) it can have %d MiB: lower it, or raise the memory" $key (div ($bytes | int64) 1048576) (div $memory 1048576) (div $large 1048576)) }}
{{- end }}
{{- end }}
{{- if gt (dig "layers" 10000 $limits | int64 | mul 1024) (div $memory 16) }}
{{- fail (printf "config.limits.layers: the list of one artifact's layers may take a sixteenth of the %d MiB of pull.memory: lower it, or raise the memory" (div $memory 1048576)) }}
{{- end }}
{{- end }}
{{- $kubelet := .Values.kubeletDir | trimSuffix "/" }}
{{- range $own := list "pods" "plugins" "plugins_registry" }}
{{- $own = printf "%s/%s" $kubelet $own }}
{{- if hasPrefix (printf "%s/" $own) (printf "%s/" $.Values.stateDir) }}
{{- fail (printf "stateDir %s lies in %s, which is the kubelet's own: choose a folder elsewhere" $.Values.stateDir $own) }}
{{- end }}
{{- end }}
{{- range $key, $_ := (include "csi-driver-oci.selectorLabels" . | fromYaml) }}
{{- if hasKey $.Values.podLabels $key }}
{{- fail (printf "podLabels has %s, by which the DaemonSet knows its pods: use nameOverride, or another label" $key) }}
{{- end }}
{{- end }}
{{- range tuple (list "podLabels" .Values.podLabels) (list "controller.podLabels" .Values.controller.podLabels) }}
{{- if hasKey (last .) "app.kubernetes.io/component" }}
{{- fail (printf "%s has app.kubernetes.io/component, which the chart sets: use another label" (first .)) }}
{{- end }}
{{- end }}
{{- $ours := list "--endpoint" "--driver-name" "--kubelet-dir" "--state-dir" "--registration-dir" "--health-endpoint" "--metrics-endpoint" "--startup-taint" "--preload" "--events" "--config" "--leases" "--log-level" "--log-format" "--lease-name" "--max-preloads-per-namespace" "--max-pinned-bytes-per-namespace" "--node-labels" "--node-condition-namespaces" "--preloads" "--provisioner" "--max-claims-per-namespace" }}
{{- range concat .Values.extraArgs .Values.controller.extraArgs }}
{{- if has (splitList "=" . | first) $ours }}
{{- fail (printf "extraArgs has %s, for which the chart has a value of its own: set that" .) }}
{{- end }}
{{- end }}
{{- $audiences := list }}
{{- range .Values.csiDriver.tokenRequests }}
{{- if has .audience $audiences }}
{{- fail (printf "csiDriver.tokenRequests has the audience %q twice" .audience) }}
{{- end }}
{{- $audiences = append $audiences .audience }}
{{- end }}
{{- if hasKey .Values.configFiles "config.yaml" }}
{{- fail "configFiles has a config.yaml: write it as config" }}
{{- end }}
{{- range $monitoring := list "podMonitor" "serviceMonitor" "rules" "dashboard" }}
{{- if and (index $.Values.metrics $monitoring).enabled (not $.Values.metrics.enabled) }}
{{- fail (printf "metrics.%s needs metrics.enabled" $monitoring) }}
{{- end }}
{{- end }}
{{- if and .Values.metrics.podMonitor.enabled .Values.metrics.serviceMonitor.enabled }}
{{- fail "metrics.podMonitor and metrics.serviceMonitor would collect everything twice: enable one" }}
{{- end }}
{{- $ports := list .Values.health.port }}
{{- if .Values.metrics.enabled }}{{ $ports = append $ports .Values.metrics.port }}{{ end }}
{{- if .Values.sidecars.livenessProbe.enabled }}{{ $ports = append $ports .Values.sidecars.livenessProbe.port }}{{ end }}
{{- if ne (len $ports) (len (uniq $ports)) }}
{{- fail "health.port, metrics.port and sidecars.livenessProbe.port must be different" }}
{{- end }}
{{- if and .Values.csiDriver.preventPodSchedulingIfMissing (semverCompare "<1.36.0-0" .Capabilities.KubeVersion.Version) }}
{{- fail (printf "csiDriver.preventPodSchedulingIfMissing needs Kubernetes 1.36, and this is %s" .Capabilities.KubeVersion.Version) }}
{{- end }}
{{- $registries := .Values.config.registries | default dict }}
{{- if ne (empty $registries.credentialProviderConfig) (empty $registries.credentialProviderBinDir) }}
{{- fail "config.registries.credentialProviderConfig and credentialProviderBinDir go together: set both" }}
{{- end }}
{{- $names := list }}
{{- range .Values.warm.artifacts }}
{{- if has .name $names }}
{{- fail (printf "warm.artifacts has the name %s twice" .name) }}
{{- end }}
{{- $names = append $names .name }}
{{- end }}
{{- $names = list }}
{{- range .Values.trustRoots.instances }}
{{- if has .name $names }}
{{- fail (printf "trustRoots.instances has the name %s twice" .name) }}
{{- end }}
{{- $names = append $names .name }}
{{- if ne (empty .url) (empty .root) }}
{{- fail (printf "trustRoots.instances: %s needs both url and root, or neither" .name) }}
{{- end }}
{{- if and .url .instance }}
{{- fail (printf "trustRoots.instances: %s has url and instance: set one of them" .name) }}
{{- end }}
{{- end }}
{{- if and .Values.admissionPolicy.enabled (semverCompare "<1.28.0-0" .Capabilities.KubeVersion.Version) }}
{{- fail (printf "admissionPolicy needs Kubernetes 1.28, and this is %s" .Capabilities.KubeVersion.Version) }}
{{- end }}
{{- if and .Values.admissionPolicy.enabled (not .Values.admissionPolicy.repositories) (not .Values.admissionPolicy.requireDigest) }}
{{- fail "admissionPolicy refuses nothing: set admissionPolicy.repositories or admissionPolicy.requireDigest" }}
{{- end }}
{{- if and .Values.podPullSecrets.enabled (semverCompare "<1.34.0-0" .Capabilities.KubeVersion.Version) }}
{{- fail (printf "podPullSecrets needs Kubernetes 1.34, and this is %s: name the secrets in the volumes" .Capabilities.KubeVersion.Version) }}
{{- end }}
{{- if and .Values.startupTaint.enabled (not .Values.serviceAccount.create) (not .Values.serviceAccount.name) }}
{{- fail "startupTaint.enabled would let every pod of the namespace change nodes: set serviceAccount.create, or serviceAccount.name" }}
{{- end }}
{{- if and .Values.startupTaint.enabled (semverCompare "<1.30.0-0" .Capabilities.KubeVersion.Version) }}
{{- fail (printf "startupTaint.enabled needs Kubernetes 1.30, whose tokens say on which node a pod is, and this is %s: without that the token of one node could change every node" .Capabilities.KubeVersion.Version) }}
{{- end }}
{{- if and .Values.openshift.enabled (not .Values.serviceAccount.create) (not .Values.serviceAccount.name) }}
{{- fail "openshift.enabled would let every pod of the namespace be privileged: set serviceAccount.create, or serviceAccount.name" }}
{{- end }}
{{- if and .Values.controller.enabled (semverCompare "<1.30.0-0" .Capabilities.KubeVersion.Version) }}
{{- fail (printf "controller.enabled needs Kubernetes 1.30, whose tokens say on which node a pod is, and this is %s" .Capabilities.KubeVersion.Version) }}
{{- end }}
{{- if and .Values.controller.enabled (not .Values.serviceAccount.create) (not .Values.serviceAccount.name) }}
{{- fail "controller.enabled would let every pod of the namespace write what nodes hold: set serviceAccount.create, or serviceAccount.name" }}
{{- end }}
{{- if and .Values.provisioner.enabled (semverCompare "<1.30.0-0" .Capabilities.KubeVersion.Version) }}
{{- fail (printf "provisioner.enabled needs Kubernetes 1.30, whose admission policies bound which PersistentVolumes the controller may create, and this is %s" .Capabilities.KubeVersion.Version) }}
{{- end }}
{{- if and (or .Values.controller.nodeLabels .Values.controller.nodeConditionNamespaces) (not .Values.controller.enabled) }}
{{- fail "controller.nodeLabels and controller.nodeConditionNamespaces need controller.enabled: they tell of preloads" }}
{{- end }}
{{- if and .Values.provisioner.storageClasses (not .Values.provisioner.enabled) }}
{{- fail "provisioner.storageClasses needs provisioner.enabled: without it, claims of these classes wait for ever" }}
{{- end }}
{{- $classes := list }}
{{- range .Values.provisioner.storageClasses }}
{{- if has .name $classes }}
{{- fail (printf "provisioner.storageClasses has the name %s twice" .name) }}
{{- end }}
{{- $classes = append $classes .name }}
{{- end }}
{{- range $key, $_ := (include "csi-driver-oci.controllerSelectorLabels" . | fromYaml) }}
{{- if hasKey $.Values.controller.podLabels $key }}
{{- fail (printf "controller.podLabels has %s, by which the Deployment knows its pods: use another label" $key) }}
{{- end }}
{{- end }}
{{- if and (include "csi-driver-oci.hasController" .) (eq (int .Values.controller.healthPort) (int .Values.controller.metricsPort)) }}
{{- fail "controller.healthPort and controller.metricsPort must be different" }}
{{- end }}
{{- end }}
