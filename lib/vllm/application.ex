defmodule VLLM.Application do
  @moduledoc false
  use Application

  @impl true
  def start(_type, _args) do
    VLLM.Telemetry.load()

    children = [
      {Registry, keys: :unique, name: VLLM.Registry},
      # The places of requests over HTTP that have a limit.
      {Registry, keys: :unique, name: VLLM.Places},
      # The names of engines that were started over HTTP.
      {Registry, keys: :unique, name: VLLM.Web.Names},
      # Before the engines, which tell clusters of themselves by it.
      VLLM.Cluster.Beacon.scope(),
      # Before the engines, whose workers use it until their end.
      {DynamicSupervisor, name: VLLM.NurserySupervisor, strategy: :one_for_one},
      # Likewise, with what the engines have for other nodes.
      {DynamicSupervisor, name: VLLM.FerrySupervisor, strategy: :one_for_one},
      {DynamicSupervisor, name: VLLM.EngineSupervisor, strategy: :one_for_one},
      {DynamicSupervisor, name: VLLM.StreamSupervisor, strategy: :one_for_one},
      VLLM.Job.Supervisor,
      # Of the admin API: what engines were asked to do, and how all is.
      {Task.Supervisor, name: VLLM.Web.Tasks},
      VLLM.Web.Live
    ]

    Supervisor.start_link(children, strategy: :one_for_one, name: VLLM.Supervisor)
  end
end
