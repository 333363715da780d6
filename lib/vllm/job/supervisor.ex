defmodule VLLM.Job.Supervisor do
  @moduledoc false
  # Jobs are stopped with the application, and never stop it: this is a temporary
  # child, so that faults of jobs, however many, end jobs only.

  use Supervisor, restart: :temporary

  alias VLLM.Job.Queue

  def start_link(_none), do: Supervisor.start_link(__MODULE__, nil, name: __MODULE__)

  @impl true
  def init(nil) do
    children = [
      Queue,
      # After it, so that runners are stopped first and their ends are told.
      {DynamicSupervisor, name: VLLM.Job.RunnerSupervisor, strategy: :one_for_one}
    ]

    Supervisor.init(children, strategy: :rest_for_one)
  end
end
