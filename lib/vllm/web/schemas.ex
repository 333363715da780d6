defmodule VLLM.Web.Schemas do
  @moduledoc false
  # What requests of the admin API take, and what is answered.

  # No name and no path has control characters.
  @plain "^[^\\x00-\\x1f\\x7f]+$"
  @text %{type: "string", minLength: 1, maxLength: 4096, pattern: @plain}
  @free %{type: "object"}

  @outputs %{
    type: "array",
    minItems: 1,
    maxItems: 64,
    items: %{
      type: "object",
      required: ["format"],
      additionalProperties: false,
      properties: %{
        format: Map.put(@text, :description, "`gguf`, `gptq`, `awq`, …"),
        type: Map.put(@text, :description, "a word that the format knows, such as `Q4_K_M`"),
        options:
          Map.put(
            @free,
            :description,
            "by the names of the format's library; over those of `type`"
          )
      }
    }
  }

  @bodies %{
    Nothing: %{type: "object", properties: %{}, additionalProperties: false},
    Start: %{
      type: "object",
      required: ["model"],
      additionalProperties: false,
      properties: %{
        model: @text,
        name: %{
          type: "string",
          pattern: "^[A-Za-z0-9][A-Za-z0-9._:@-]*$",
          minLength: 1,
          maxLength: 100,
          description:
            "what clients of `/v1` call it; by default the last part of the model's name"
        },
        options: Map.put(@free, :description, "those of an engine, see `VLLM`")
      }
    },
    Which: %{
      type: "object",
      additionalProperties: false,
      properties: %{
        replica: %{
          type: "integer",
          minimum: 1,
          maximum: 10_000,
          description: "only this one; by default all"
        }
      }
    },
    Reload: %{
      type: "object",
      required: ["options"],
      additionalProperties: false,
      properties: %{options: Map.put(@free, :description, "over those that it has, also `model`")}
    },
    Scale: %{
      type: "object",
      required: ["replicas"],
      additionalProperties: false,
      properties: %{replicas: %{type: "integer", minimum: 1, maximum: 64}}
    },
    Question: %{
      type: "object",
      required: ["model"],
      additionalProperties: false,
      properties: %{
        model: @text,
        options:
          Map.put(
            @free,
            :description,
            "those of an engine; also `device` or `devices`, for another machine"
          )
      }
    },
    Push: %{
      type: "object",
      required: ["model", "repository"],
      additionalProperties: false,
      properties: %{
        model: Map.put(@text, :description, "its name on this machine"),
        repository: Map.put(@text, :description, "`owner/name`"),
        options: Map.put(@free, :description, "those of `VLLM.Models.push/3`")
      }
    },
    Quantize: %{
      type: "object",
      required: ["model", "to"],
      additionalProperties: false,
      properties: %{
        model: @text,
        name: %{
          type: "string",
          pattern: "^[A-Za-z0-9][A-Za-z0-9._-]*$",
          minLength: 1,
          maxLength: 96,
          description: "the outputs are `name:label` then"
        },
        to: @outputs,
        options: Map.put(@free, :description, "those of `VLLM.Job.quantize/2`")
      }
    },
    Compare: %{
      type: "object",
      required: ["models"],
      additionalProperties: false,
      properties: %{
        models: %{
          type: "array",
          items: @text,
          minItems: 2,
          maxItems: 16,
          uniqueItems: true,
          description: "the first is the reference"
        },
        options: Map.put(@free, :description, "those of `VLLM.Quantization.compare/2`")
      }
    }
  }

  @doc "What a request takes."
  @spec body(atom()) :: map()
  def body(name), do: Map.fetch!(@bodies, name)

  @spec lines() :: map()
  def lines do
    %{lines: %{type: "integer", minimum: 1, maximum: 5000, default: 200, description: "how many"}}
  end

  @spec files() :: map()
  def files do
    %{
      files: %{
        type: "boolean",
        enum: [true],
        default: true,
        description:
          "with the files that were made or downloaded here, which are not kept without the name; those of a " <>
            "folder that was registered always stay"
      }
    }
  end

  @spec outputs() :: map()
  def outputs,
    do: %{outputs: %{type: "boolean", default: false, description: "what it has made, too"}}

  ## Answers

  @string_or_null %{type: ["string", "null"]}
  @number_or_null %{type: ["number", "null"]}
  @integer_or_null %{type: ["integer", "null"]}
  @about %{
    type: ["object", "null"],
    required: ["reason", "message"],
    properties: %{reason: %{type: "string"}, message: %{type: "string"}}
  }

  defp list(items), do: %{type: "array", items: items}
  defp ref(name), do: %{"$ref": "#/components/schemas/#{name}"}

  defp object(properties) do
    %{
      type: "object",
      required: properties |> Keyword.keys() |> Enum.map(&Atom.to_string/1),
      properties: Map.new(properties)
    }
  end

  @doc "What is answered, by the names that routes have for it."
  @spec answers() :: %{atom() => map()}
  def answers do
    %{
      Description: %{type: "object", required: ["openapi", "info", "paths"]},
      Error:
        object(
          error: object(reason: %{type: "string"}, message: %{type: "string"}, details: @free)
        ),
      Engines: object(engines: list(ref("EngineState"))),
      Engine: object(engine: ref("EngineState")),
      EngineState: engine(),
      Lines: object(lines: list(%{type: "string"})),
      Report: %{
        type: "object",
        required: ["ok?", "findings"],
        description: "`VLLM.Quantization.Report`"
      },
      Estimate: %{
        type: "object",
        required: ["fits?", "devices", "parts", "available_bytes"],
        description:
          "`VLLM.Quantization.Estimate`; `parts` and `available_bytes` are of all devices together"
      },
      Models: object(models: list(model())),
      Freed: object(freed_bytes: %{type: "integer"}),
      Formats: object(formats: list(format())),
      JobEstimate: object(estimates: list(estimate()), together: @free),
      Comparison: %{
        type: "object",
        required: ["rows"],
        description: "`VLLM.Quantization.Comparison`"
      },
      Jobs: object(jobs: list(ref("JobState"))),
      Job: object(job: ref("JobState")),
      JobState: job()
    }
  end

  defp engine do
    object(
      id: %{type: "string"},
      name: @string_or_null,
      model: %{type: "string"},
      state: %{
        type: "string",
        enum: ~w(loading ready draining drained restarting failed stopping stopped)
      },
      ready: %{type: "boolean"},
      progress: %{
        type: ["object", "null"],
        properties: %{phase: %{type: "string"}, percent: @number_or_null}
      },
      replicas: list(replica()),
      running: @integer_or_null,
      waiting: @integer_or_null,
      tokens_per_second: @number_or_null,
      ttft_seconds: @number_or_null,
      itl_seconds: @number_or_null,
      kv_cache_usage: @number_or_null,
      prefix_cache_hit_rate: @number_or_null,
      memory: list(@free),
      quantization: @string_or_null,
      max_model_len: @integer_or_null,
      deaths: list(@free),
      served_name: @string_or_null,
      error: @about,
      operation: %{
        type: ["object", "null"],
        description:
          "what it was last asked to do, and what came of that: `running`, `done` or `failed`",
        properties: %{name: %{type: "string"}, state: %{type: "string"}, error: @about}
      }
    )
  end

  defp replica do
    object(
      index: %{type: "integer"},
      state: %{type: "string"},
      node: %{type: "string"},
      devices: %{type: ["array", "null"]},
      pid: @integer_or_null,
      restarts: %{type: "integer"},
      in_flight: %{type: "integer"},
      error: @about
    )
  end

  defp model do
    object(
      name: %{type: "string"},
      path: @string_or_null,
      format: %{type: "string"},
      type: @string_or_null,
      bytes: %{type: "integer"},
      created_at: @string_or_null,
      job: @string_or_null,
      kind: %{type: "string", enum: ["model", "adapter"]},
      origin: %{type: "string"},
      aliases: list(%{type: "string"})
    )
  end

  defp format do
    object(
      format: %{type: "string"},
      types: list(%{type: "string"}),
      options: list(@free),
      refused: @string_or_null
    )
  end

  defp estimate do
    object(
      format: %{type: "string"},
      type: %{type: "string"},
      bytes: %{type: "integer"},
      disk_bytes: %{type: "integer"},
      memory_bytes: %{type: "integer"},
      minutes: %{type: "array", items: %{type: "number"}},
      quality: @number_or_null
    )
  end

  defp job do
    object(
      id: %{type: "string"},
      name: %{type: "string"},
      kind: %{type: "string"},
      model: %{type: "string"},
      state: %{type: "string"},
      phase: @string_or_null,
      percent: @integer_or_null,
      seconds_left: @number_or_null,
      waiting_for: @string_or_null,
      outputs: list(output()),
      error: @about,
      created_at: @string_or_null,
      updated_at: @string_or_null
    )
  end

  defp output do
    object(
      name: %{type: "string"},
      format: %{type: "string"},
      type: %{type: "string"},
      state: %{type: "string"},
      bytes: @integer_or_null,
      quality: %{
        type: ["object", "null"],
        description: "what was lost, by the names of `quantize/compare`"
      },
      error: @about
    )
  end
end
