defmodule VLLM.Data do
  @moduledoc false
  # The folder for what this library makes and must not lose: jobs, the models
  # that came of them, and the registry of names. (What can be had again is in
  # the cache folder, see VLLM.Python.)
  #
  #     jobs/<id>/                 a job: its file, its log, and what it works on in `tmp`
  #     models/<name>/<label>/     a model that was made
  #     registry/<name>.json       what is known of a name
  #     isq/<key>/                 a model that was quantized in place
  #     trash/                     what is being deleted

  @doc """
  The folder: `config :ex_vllm, data_dir: "/srv/models"`, by default the user's own for data of
  applications. Workers have it as `EX_VLLM_DATA`.
  """
  @spec dir() :: Path.t()
  def dir do
    case Application.get_env(:ex_vllm, :data_dir) do
      nil -> :filename.basedir(:user_data, "ex_vllm") |> to_string()
      dir -> Path.expand(dir)
    end
  end

  @doc "The folder of all jobs, or of one."
  @spec jobs() :: Path.t()
  @spec jobs(String.t()) :: Path.t()
  def jobs, do: Path.join(dir(), "jobs")
  def jobs(id), do: Path.join(jobs(), id)

  @doc "The folder of a model that was made."
  @spec model(String.t(), String.t()) :: Path.t()
  def model(name, label), do: Path.join([dir(), "models", name, label])
end
